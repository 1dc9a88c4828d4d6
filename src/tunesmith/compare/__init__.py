"""Prompt, examples, retrieval or fine-tuning on the same held-out questions: arms (what each is asked), endpoint (an arm
elsewhere), work (answers, kept one by one), result (which way is worth it).
"""

"""Passages of documents for a question: a folder is read, cut into chunks and indexed in one file; answers cite what was found.

from tunesmith.retrieve import Index
index = Index.create_or_open("documents.sqlite")
index.add("manuals")
for passage in index.search("How do I reset the pump?"): ...
"""

from tunesmith.retrieve import cite, measures
from tunesmith.retrieve.index import Added, Index
from tunesmith.retrieve.store import Passage

__all__ = ["Added", "Index", "Passage", "cite", "measures"]

"""Faults that one row shows by itself. A detector takes a chunk's `Rows` and tells which of them have it, and where."""

from __future__ import annotations

import itertools
import json
import re
from bisect import bisect
from collections.abc import Iterator

import numpy as np

from tunesmith import redact
from tunesmith.data.findings import text as t
from tunesmith.data.findings.text import Hits, Joined, Rows

REPEATED = 120  # of a longer one the beginning: worked answers often begin with a clause of the question
ASKED, BEFORE = 10, 40  # characters of the shortest question, and of what may stand before it: `Question: "`
FIRST_SIGNS = frozenset("*# AaCGBQFPDUHYIПА助ア")  # of LABELLED
COPY = 40  # characters of a prompt that an answer repeats by more than chance
SHORTEST = 16  # of an answer that ends in a list or in JSON
LISTED = frozenset("-*•|<0123456789")  # what the last word of a list, a table or a tag that was begun begins with
OPEN_ENDED = 80  # an answer shorter than this may end as it likes

_CANT = (
    r"(?:can(?:no|')?t|can not|won't|will not"
    r"|(?:am|'m|are|'re) (?:currently |really )?(?:not (?:able|allowed|permitted)|unable) to)"
)
_HELP = (
    r"(?:(?:\w+ly |in good \w+ )?(?:assist|help(?! but| it)|provide|fulfill?|comply|answer|generate|create|do (?:that|this|it)"
    r"|share|discuss|engage|respond"
    r"|explain|describe|support|promote|process|continue (?:with )?(?:this|the) conversation|browse|access|participate|endorse"
    r"|condone"
    r"|write (?:about|that|this)|talk about|offer (?:advice|guidance)|express|perform|give (?:you )?(?:\w+ ){0,2}(?:advice"
    r"|instructions|steps|details))"
    r"|be able to (?:help|assist))\b"
)
_APOLOGY = (
    r"(?:(?:i'?m|i am|we are|we're) (?:\w+ ){0,2}(?:sorry|afraid)(?: that)?|(?:so |very )?sorry(?: about that)?|(?:my "
    r"|our )?apologies"
    r"|(?:i|we) (?:do |must )?apologi[sz]e|unfortunately|regrettably)[,.!]* (?:but )?"
)
REFUSAL = re.compile(
    rf"(?:no[,.!] |as an? [^,.!?]{{3,60}}, )?(?:(?:{_APOLOGY})+(?:as an? (?:[^,.!?]{{3,60}}, "
    rf"|ai ))?(?:(?:but )?i\b[^.!?]{{0,60}}?\b{_CANT}"
    rf"|(?:but )?i .{{0,30}}?(?:do not|don't) have|(?:but )?(?:(?:that|this|it)(?:'s| is) (?:against|outside|beyond)"
    rf"|we {_CANT} (?:help|assist|answer|process)))"
    rf"|(?:{_APOLOGY})?(?:i {_CANT} {_HELP}|i'm not going to {_HELP}|i'm (?:not able|unable) to {_HELP}|(?:i )?can(?:no"
    rf"|')t (?:comply|fulfill?|assist)"
    rf"|we {_CANT} (?:assist|help you with|answer|comply|fulfill?|process requests)"
    r"|i (?:must|have to|need to|'ll have to|will have to|would|'d)(?: \w+ly)? (?:decline|pass on this|(?:rather|prefer) not)"
    r"|i'(?:ll have to|d)(?: \w+ly)?"
    r" (?:decline|pass on this|rather not|prefer not)|i (?:must )?refuse to|i regret that i"
    r"|i (?:do not|don't) (?:feel comfortable|have the (?:ability|capability|capacity)|think it(?:'s| is"
    r"| would be) (?:appropriate|ethical|right to)"
    r"|have (?:any |enough )?(?:access|information|data) )|(?:i'm|i am) not comfortable"
    r"|(?:that|this|it)(?:'s| is| would be) (?:not something|outside (?:of )?what|beyond what) (?:i|we) can"
    r"|it(?:'s| is| would be) (?:inappropriate|unethical|not (?:appropriate|ethical|possible)) for me to"
    r"|(?:this|that|it) (?:goes|is) against (?:my|our) (?:\w+ )?(?:guideline|polic|programming|principle|value)"
    r"|(?:my|our) (?:\w+ )?(?:guidelines|programming|polic(?:y|ies)|principles) (?:do(?:es)? not|don't|doesn't|prevents?"
    r"|prohibits?|forbids?)"
    r"|(?:this|your|the|that) (?:request|question|prompt|topic) (?:violates|goes against|is against|is not allowed|conflicts with)"
    rf"|(?:i'm|i am|my purpose is)[^.!?]{{0,20}} to be (?:helpful|safe|harmless)[^.!?]{{0,40}}\bi {_CANT} {_HELP}))"
    # German, French, Spanish, Italian, Portuguese, Dutch, Polish, Russian, Chinese, Japanese
    r"|(?:es )?tut mir (?:\w+ )?leid[^.!?]{0,60}\b(?:kann|darf)\b[^.!?]{0,60}\bnicht\b|(?:entschuldigung"
    r"|leider)[^.!?]{0,20}\b(?:kann|darf) ich\b[^.!?]{0,60}nicht"
    r"|entschuldigung[^.!?]{0,20}\bich\b[^.!?]{0,20} nicht|ich (?:kann|darf) [^.!?]{0,50}(?:nicht|keine) (?:\w+ )?(?:beantworten"
    r"|helfen|erfüllen|nachkommen|geben|tun|weiterhelfen)"
    r"|(?:je suis (?:\w+ )?)?désolée?[^.!?]{0,25}\bje ne (?:peux|suis)|je ne peux pas (?:\w+ ){0,2}(?:aider|répondre|fournir"
    r"|faire|accéder|satisfaire)"
    r"|je (?:ne suis pas|suis) (?:en mesure|dans l'impossibilité) d"
    r"|lo siento[^.!?]{0,25}\bno (?:puedo|me es)|no (?:puedo|me es posible) (?:ayudar|responder|proporcionar|cumplir|hacer)"
    r"|(?:mi dispiace|spiacente|scusa)[^.!?]{0,25}\bnon posso|non posso (?:aiutar|rispondere|fornire)"
    r"|(?:desculpe|sinto muito|lamento)[^.!?]{0,25}\bnão (?:posso|consigo)|não posso (?:ajudar|responder|fornecer)"
    r"|(?:het spijt me|sorry)[^.!?]{0,25}\b(?:ik kan|kan ik)\b[^.!?]{0,40} niet|(?:przykro mi|przepraszam"
    r"|niestety)[^.!?]{0,25}nie mogę"
    r"|(?:извините|простите|к сожалению|мне жаль)[^.!?]{0,25}(?:я )?не (?:могу|в состоянии)|я не могу (?:помочь|ответить|выполнить)"
    r"|(?:很|非常)?(?:抱歉|对不起|對不起)[^。！？]{0,12}(?:无法|不能|没有办法|無法|没法)|我(?:无法|不能)(?:回答|提供|帮助)"
    r"|(?:大変)?申し訳(?:ありません|ございません)が[^。！？]{0,25}(?:できません|できかねます)"
)
REFUSAL_BEGINS = (
    "i'", "im ", "i am ", "i can", "i won", "i will ", "i apolog", "i must ", "i do", "i have to", "i need to", "i refuse",
    "i would", "i regret",
    "we ", "we'", "my ", "our ", "this ", "that", "it ", "it'", "no,", "no.", "no!", "as a", "sorry", "so sorry",
    "very sorry", "unfortunately",
    "regrettably", "apologies", "your ", "the request", "cannot", "can't",
    "es tut", "tut mir", "entschuldigung", "leider", "ich ", "je ", "désolé", "lo siento", "no p", "no me", "mi dispiace",
    "spiacente", "scusa", "non p",
    "desculpe", "sinto", "lamento", "não", "het spijt", "przykro", "przepraszam", "niestety", "извините", "простите",
    "к сожалению", "мне жаль", "я не",
    "很抱歉", "抱歉", "非常", "对不起", "很对不起", "對不起", "我", "申し訳", "大変",
)  # fmt: skip
_MAKERS = "openai|anthropic|alibaba(?: cloud)?|google|meta(?: ai)?|mistral(?: ai)?|deepseek|lmsys"
_MODELS = "chatgpt|gpt-?[345](?:\\.5)?|claude|bard|gemini|qwen|llama|vicuna|deepseek|copilot"
BOILERPLATE = re.compile(
    r"\bas an? (?:large |artificial |virtual |digital |text-based |conversational )?(?:ai|a\.i\.|language"
    r"|artificial intelligence|(?<=virtual )assistant)"
    r"(?:-powered|-based)?(?: language)? ?(?:model|assistant|chatbot|system)?\b(?=,| i\b| developed| trained| created)"
    r"|\bi(?:'|’)?(?: a)?m (?:just |only |merely |simply )?an? (?:ai|large language|language|artificial intelligence)"
    r"(?: language)? (?:model|assistant|chatbot)\b"
    r"|\bi(?:'|’)?(?: a)?m (?:just |only |merely )an? (?:ai|artificial intelligence|machine|computer program|chatbot)\b"
    r"|\bi(?:'|’)?(?: a)?m an? (?:ai|artificial intelligence|computer program)(?=[,.;]| and (?:have|do|can)\b| (?:developed"
    r"|created|trained|made|built) by)"
    r"|\b(?:being|since i(?:'|’)?(?: a)?m|because i(?:'|’)?(?: a)?m) an? (?:ai|artificial intelligence|language model)\b,?"
    r"|\bmy (?:knowledge cutoff|last (?:knowledge )?(?:update|training)|training data (?:only )?(?:goes|extends|ends|includes"
    r"|is limited))"
    r"|\bas of my (?:last |latest |knowledge |training )*(?:update|cutoff|cut-off|training|knowledge)|\bbased on my training data\b"
    rf"|\bi(?:'|’)?(?: a)?m (?:{_MODELS})(?=,|\.| an? (?:ai|large|language)|$)|\bi(?:'"
    rf"|’)?(?: a)?m [\w-]{{2,20}}, (?:an? [\w ]{{2,40}} )?(?:created|developed|made|trained) by (?:{_MAKERS})\b"
    rf"|\bi (?:am|was) (?:an? [\w ]{{2,40}} )?(?:trained|developed|created|made) by (?:{_MAKERS})\b"
    r"|\bi (?:do not|don(?:'|’)t|cannot|can(?:'|’)t) (?:have access to |access |see |have "
    r"|browse the internet or \w+ )real[- ]time (?:data|information)\b"
    r"|\bi hope this (?:email|message) finds you well\b|\bregenerate response\b"
    r"|\bi (?:do not|don(?:'|’)t) have personal (?:opinions|beliefs|experiences|feelings|preferences|thoughts|emotions)\b"
    r"|\bals (?:eine? )?(?:ki(?:-(?:sprach)?modell)?|künstliche intelligenz|sprachmodell)\b(?=,| habe| kann| bin| verfüge)"
    r"|\bals ki-(?:sprach)?modell\b"
    r"|\ben tant qu(?:e |'|’)(?:modèle de langage|assistant virtuel|ia|intelligence artificielle)\b"
    r"|\bcomo (?:modelo de lenguaje|ia|inteligencia artificial)\b(?=,| de|$)|\bcomo modelo de lenguaje\b"
)
BOILERPLATE_GATES = (
    "an ai", "language model", "artificial intelligence", "virtual assistant", "based ai", "cutoff", "cut-off", "my last",
    "as of my", "training data",
    "computer program", "real-time ", "finds you well", "regenerate response", "personal ", "chatgpt", "claude", "gemini",
    "qwen", "llama", "vicuna",
    "deepseek", "openai", "anthropic", "alibaba", "by google", "als ki", "ki-modell", "sprachmodell",
    "künstliche intelligenz", "en tant qu",
    "como modelo", "como ia", "inteligencia artificial",
)  # fmt: skip
SPECIAL = re.compile(
    r"<\|[A-Za-z0-9_ \u2581]{2,40}\|>|<｜[^｜\n]{2,40}｜>|\[/?INST\]|<</?SYS>>|</?s>|<(?:bos|eos|pad|unk|mask)>|<(?:start"
    r"|end)_of_(?:turn|image)>"
    r"|<extra_id_\d{1,3}>|\[/?(?:TOOL_CALLS|AVAILABLE_TOOLS|TOOL_RESULTS|SYSTEM_PROMPT)\]|\[(?:PAD|UNK|CLS|MASK|BOS|EOS|SEP)\]"
)
SPECIAL_GATES = (
    "|>", "｜>", "SYS>>", "<s>", "</s>", "os>", "<pad>", "<unk>", "<mask>", "_of_turn>", "_of_image>", "INST]", "PAD]", "UNK]",
    "CLS]", "MASK]",
    "OS]", "SEP]", "<extra_id_", "TOOL_CALLS]", "_TOOLS]", "TOOL_RESULTS]", "SYSTEM_PROMPT]",
)  # fmt: skip
STRUCK = re.compile(r"<s>[^<>\n]{0,120}</s>")
WHOLE_LINE = re.compile(r"[ \t]*(?:\n|<s>|\Z)")
CONFLICT = re.compile(r"^[ \t>]{0,24}?(?:<{7}(?: |$)|>{7}(?: |$)|\|{7}(?: |$))", re.MULTILINE)
MARKERS = re.compile(r"^(?:[ \t]+|> )?([<>=])\1{6}(?![<>=])", re.MULTILINE)
BRANCH = re.compile(
    r"(?:HEAD|[0-9a-f]{7,40}|master|main|theirs|ours|\.(?:mine|r\d+)|[\w.-]+/\S+|Updated upstream|Stashed changes)\b"
)
_ASKS = "Human|User|USER|HUMAN|Benutzer|Nutzer|Utilisateur|Usuario|Utente|Usuário|Gebruiker|Пользователь|用户|ユーザー"
_SAYS = "Assistant|ASSISTANT|Assistent|Asistente|Assistente|Ассистент|助手|アシスタント"
ROLE_LINE = re.compile(
    r"^(?:#{2,4} ?(?:Instruction|Input|Response|Output|User|Human|Assistant|System|Prompt)\b:?"
    rf"|[\[<*]*(?:{_ASKS}|{_SAYS})[\]>*]* ?[:：]|\**System\**:)",
    re.MULTILINE,
)
# At the beginning of an answer the name of who speaks it is one of these; `User:` may be the first word of a glossary.
LABELLED = re.compile(
    rf"[*#\s]{{0,5}}(?:{_SAYS}|assistant|ChatGPT|GPT|AI|Bot)[*\s]{{0,3}}[:：]|Below is an instruction that describes a task"
    r"|(?:Q|Question|Frage|Pregunta|Domanda|Pergunta|Instruction|Prompt|User|Human|Customer|You|User)[ *]{0,3}[:：][^\n]{3,400}\n+"
    r"\**(?:A|Answer|Antwort|Respuesta|Risposta|Réponse|Resposta|Response|Completion|Assistant|AI|ChatGPT|Agent)[ *]{0,3}[:：]"
)
INVITES = re.compile(
    r"\b(?:dialog(?:ue)?s?|conversations?|chat|transcripts?|interviews?|script|scene|play|log|faq|flash ?cards?|quiz|format"
    r"|template|glossary|role ?play\w*"
    r"|q ?& ?a|questions|jokes?|gespräch\w*|dialog\w*|translate|logs?|sketch|story|prompts?)\b|(?:user|human|assistant|system) ?:",
    re.IGNORECASE,
)
ROLE_GATES = (
    *(f"#{gap}{name}" for gap in ("", " ") for name in ("Ins", "Inp", "Res", "Pro", "Out")),
    "Human", "User", "Assistant", "System", "USER", "ASSISTANT", "HUMAN", "Benutzer", "Nutzer", "Assistent", "Utilisateur",
    "Usuario", "Asistente",
    "Utente", "Usuário", "Gebruiker",
)  # fmt: skip
ROLES_BEYOND = frozenset("П用ユАア助")  # where names of roles begin that no gate can tell
# UTF-8 read as Latin-1 or Windows-1252, or what was left where a decoder gave up
MOJIBAKE = re.compile(
    r"\ufffd|[ÃÂ][\x80-\xbf\u0152\u0153\u0160\u0161\u0178\u017d\u017e\u0192\u02c6\u02dc\u2013-\u2022\u2026\u2030\u20ac\u2122]"
    r"|â(?:€|[\x80-\x9f\u201a][\x80-\xbf])|ð(?:Ÿ|\x9f)|ï»¿|[ÐÑ][\x80-\xbf][ÐÑ]"
)
# What other codecs leave: the first sign, what may follow it, and the pattern at that place. Signs that good text has too count
# twice in a row, or among letters.
_C1252 = "\x80-\xbf\u0152\u0153\u0160\u0161\u0178\u017d\u017e\u0192\u02c6\u02dc\u2013-\u2022\u2026\u2030\u2039\u203a\u20ac\u2122"
_C1251 = "\u0402-\u040f\u0452-\u045f\xa0-\xbf\u2013-\u203a\u20ac\u2122\u0490\u0491\u2116"
_C1250 = (
    "\x80-\x9f\u0104\u0105\u013d\u013e\u0141\u0142\u015a\u015b\u015e-\u0161\u0164\u0165\u0179-\u017e\u02c7\u02d8\u02db\u02dd"
    "\xa4\xa6-\xa9\xac-\xb1\xb4-\xb8\u2020\u2021\u2030\u203a\u20ac\u2122"
)
_MAC = "©º§®¥¢£•¶ß´¨Æ≥±†ø¿¡«»ª∂"
_GBK = "脽枚眉盲茅猫帽贸铆谩莽氓酶"
DAMAGE = tuple(
    (frozenset(t.members(leads)), leads, follow, re.compile(pattern))
    for leads, follow, pattern in (
        ("ãäåæçèéêëì", _C1252, f"(?:[ãäåæçèéêëì][{_C1252}]{{2}}){{2}}"),  # Chinese, Japanese, Korean as Windows-1252
        ("ÎÏ×ØÙ", _C1252, f"(?:[ÎÏ×ØÙ][{_C1252}]){{3}}"),  # Greek, Hebrew, Arabic as Windows-1252
        ("ÄÅ", "\x80-\xbf\u0152\u0178\u201a\u201e\u2020\u2021\u203a\u2122", "Ä[\x80-\x9f\u0178\u2020\u2021\u203a\u2122\xb0\xb1]"
         "|Å[\x80-\x9f\u0152\u0178\u201a\u201e\u2122\u203a\xa1\xba\xbc-\xbe](?!\u201c)"),
        ("ĂĹÄ", _C1250, f"[ĂĹ][{_C1250}]|Ä[\x80-\x9f\u0164\u0179\u015b\u2122\u203a]"),  # Windows-1250
        ("├Γ", "\xa1-\xff\u0192\u0393-\u03c6\u2310\u2500-\u25a0Ç",
        "(?<=[A-Za-z])├[^\\s─━│├└]|├[^\\s─━│├└┌|-](?=[A-Za-z])|ΓÇ[\xa3-\xff\u0192-\u2593]"),
        ("√‚", f"{_MAC}Ä", f"(?<=[A-Za-z])√[{_MAC}]|√[{_MAC}](?=[a-z])|‚Ä[ôúùîìò¶¢]"),  # Mac OS Roman; above it 437 and 850
        ("РС", _C1251, f"(?:[РС][{_C1251}]){{2}}"),  # Russian as Windows-1251
        ("ΞΟ", "\x80-\xbf\u0384-\u0390\u03ac-\u03ce\u2013-\u203a\u20ac\u2122",
        "(?:[ΞΟ][^\\sΑ-ΩΆ-ΏA-Za-z]){3}"),  # Greek as Windows-1253
        (_GBK, f"{_GBK}a-z", f"(?<=[a-z])[{_GBK}]{{1,2}}[a-z]"),
        ("а-я", "А-Я", "(?<![А-яЁё])[а-я][А-Я]{3,}(?![а-яё])"),  # KOI8-R and Windows-1251 mixed up
        ("À-Öà-öø-ý", "à-öø-ý",
        "(?<![A-Za-zÀ-ÿ])(?:[À-Ö][à-öø-ý]{3,}[ ,.!?]{1,2}[à-öø-ý]{3,}|[à-öø-ý]{4,}[ ,.!?]{1,2}[à-öø-ý]{4,})"),
        ("ийыкзцьфбчщл", "a-z", "(?<=[a-z])[ийыкзцьфбчщл][a-z]"),  # French as Windows-1251; letters of another script within a word
    )
)  # fmt: skip
MOJIBAKE_SIGNS, MARK = frozenset("\ufffdÃÂâðÐÑ"), frozenset("ï»¿")
CONTROL = re.compile("\x1b\\[[0-9;]*m|[\x00-\x08\x0b\x0e-\x1f\x7f\x80-\x84\x86-\x9f]")
CONTROL_BYTES = bytes(b for b in (*range(32), *range(127, 160)) if b not in (9, 10, 12, 13, 0x85))
# ZWNJ and ZWJ belong to Persian, Indic scripts and emoji: they are a fault between Latin letters only. A zero-width space parts
# words in Thai, Lao, Burmese and Khmer. Tag characters write text that nobody sees, but behind a black flag they are a flag.
INVISIBLE = re.compile(
    "(?<![\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff])\u200b"
    "|[\u200e\u200f\u2060-\u2064\u00ad\u202a-\u202e\u2066-\u206f\u3164\uffa0]|(?<![\u1800-\u18af])\u180e"
    "|(?<=[A-Za-z])[\u200c\u200d](?=[A-Za-z])|(?<!^)\ufeff"
    "|(?<![\U0001f3f4\U000e0001-\U000e007f])[\U000e0001-\U000e007f]"
)
_CODES = (
    *range(0x200B, 0x2010),
    *range(0x2060, 0x2065),
    0xAD,
    0xFEFF,
    *range(0x202A, 0x202F),
    *range(0x2066, 0x2070),
    0x180E,
    0x3164,
    0xFFA0,
)
_TAGS = range(0xE0001, 0xE0080)
UNSEEN = frozenset(map(chr, (*_CODES, *_TAGS)))
BIDI = frozenset("\u200e\u200f\u202a\u202b\u202c\u2066\u2067\u2068\u2069")
RIGHT_TO_LEFT = re.compile("[\u0590-\u08ff\ufb1d-\ufdff\ufe70-\ufefc]")
OPEN_SIGNS = frozenset(",([{–—:-")
OPEN_WORDS = frozenset(re.findall(r"\S+",
    "the a an of to and or with for in that which is are was were by from at on because your their its my our this than if but when"
    " whose into be"
    " der die das dem den des und ein eine einen einer eines zu mit für von dass wenn weil"
    " le la les de et des du un une el los las y en que il lo gli di della che os as da do dos das um uma"
))  # fmt: skip
STOPS = frozenset("0123456789.!?\"'”’)。！？")  # after these an answer does not stop in the middle, but for a list's `3.`
STUB = re.compile(
    r"\n[ \t]*(?:\d{1,3}[.)]|[-*•]|\|[^|\n]*)[ \t]*\Z|<[a-z/][^<>\n]{0,40}\Z"
)  # a list, a table or a tag that was begun


PLACEHOLDER = re.compile(
    r"[\"'*(\[<{]{0,3}(?:n\.? ?/? ?a|null|none|nan|nil|todo|fixme|tbd|tba|undefined|unknown|k\. ?a|s\. ?o|lorem ipsum.*|x{3,}"
    r"|asdf\w*|placeholder"
    r"|#(?:n/a|ref!|value!|div/0!|name\?|null!|num!)|todo: .{0,40}|(?:to be|noch zu) (?:added|done|determined|defined|written"
    r"|announced)|coming soon"
    r"|no (?:answer|response|data|output|text|content|value)(?: (?:available|provided|given|found))?|not (?:available|applicable"
    r"|provided|specified)"
    r"|keine (?:angabe|antwort|daten)|sin (?:respuesta|datos)|sans (?:réponse|objet)|object object|(?<=[(\[<])(?:empty|blank)"
    r"|(?:insert |your |write |enter |the )*(?:answer|response|output|text|reply|completion)(?: here| goes here)?"
    r"|<[^<>\n]{0,20}>)[\"'*)\]>}]{0,3}[.!]?",
    re.IGNORECASE | re.DOTALL,
)
NOTHING = frozenset("-–—_.…?*/\\|~#()[]{}<>\"'`=:;,")


def placeholder(rows: Rows) -> Hits:
    """Nothing but signs, or a word that stands for no answer. An empty list is an answer where the prompt asks for one."""
    found: Hits = {}
    for part, answer in enumerate(rows.answers.parts):
        if len(answer) < 40 or answer[:11].lower() == "lorem ipsum":
            plain = answer.strip()
            if NOTHING.issuperset(plain) or PLACEHOLDER.fullmatch(plain):
                found.setdefault(rows.answers.rows[part], (part, 0, len(answer)))
    return found


def truncated(rows: Rows) -> Hits:
    """By the end alone. Where the question ends in the same way the answer may too, as in texts that go line by line."""
    found: Hits = {}
    answers = rows.answers
    for part, answer in enumerate(answers.parts):
        last = answer[-1:]
        if last in STOPS and answer[:1] not in ("{", "[") and not (last in ".)" and answer[-2:-1].isdigit()):
            continue
        tail = answer[-48:]
        words = tail.rsplit(None, 1)
        word = words[-1] if words else ""
        if (len(answer) >= OPEN_ENDED and (word in OPEN_WORDS or (word[-1:] in OPEN_SIGNS and word and word[-2:] != "--"))) or (
            (word[:1] in LISTED or "<" in tail) and len(answer) >= SHORTEST and STUB.search(answer, max(0, len(answer) - 60))
        ):
            end = len(answer.rstrip())
            found.setdefault(answers.rows[part], (part, end - len(word), end))
        elif answer[:1] in ("{", "[") and len(answer) >= SHORTEST and _stops_in_json(answer):
            found.setdefault(answers.rows[part], (part, len(answer.rstrip()), len(answer)))
    if "```" in answers.text:
        for part, answer in enumerate(answers.parts):
            if answer.count("```") % 2:
                at = answer.rfind("```")
                if answer[at + 3 :].strip() or answer[:at].endswith("\n\n"):  # not one too many at the very end
                    found.setdefault(answers.rows[part], (part, at, at + 3))
    if found:
        asked = {row: prompt.rstrip()[-1:] for row, prompt, _ in rows.pairs if row in found}
        for row, last in asked.items():
            part, _, end = found[row]
            if last in OPEN_SIGNS and answers.parts[part][end - 1 : end] in OPEN_SIGNS:
                del found[row]
    return found


def _stops_in_json(text: str) -> bool:
    """Whether it begins as JSON and ends before that does."""
    text = text.rstrip()
    if not re.match(r"[{\[]\s*(?:\"|\{|\[|\d)", text) or text[-1] in "}]`":
        return False
    try:
        json.JSONDecoder().raw_decode(text)
    except json.JSONDecodeError as e:
        return e.pos >= len(text) - 1 or e.msg.startswith("Unterminated")
    return False


USUAL = {("user", "assistant"), ("system", "user", "assistant"), ("user", "assistant", "user", "assistant")}


def role_order(rows: Rows) -> Hits:
    """Told by roles alone: the excerpt is the first message that stands wrong. An answer that calls a tool comes before one."""
    found: Hits = {}
    part = 0
    for i, c in enumerate(rows.conversations):
        if c.kind == "chat" and (c.fixes or tuple(m.role for m in c.messages) not in USUAL):
            before, wrong = "", -1
            for k, m in enumerate(c.messages):
                role = m.role
                if (
                    (role == "system" and k)
                    or (role == "assistant" and before in ("", "system", "assistant"))
                    or (role == "user" and before in ("user", "tool") and k)
                ):
                    wrong = k
                    break
                before = role
            if wrong < 0 and before == "user":
                wrong = len(c.messages) - 1
            if wrong < 0 and any(f.startswith(("joined", "merged")) for f in c.fixes):
                wrong = 0
            if wrong >= 0:
                found[i] = (part + wrong, 0, 0)
        part += len(c.messages)
    return found


def prompt_in_answer(rows: Rows) -> Hits:
    """The question at the beginning of its answer, further turns behind it, or the speaker's name before it. Dialogues that the
    prompt asks for and those in a code block are what they should be."""
    found: Hits = {}
    answers = rows.answers
    part_of = {row: part for part, row in enumerate(answers.rows)}  # the last of each row
    invited: dict[int, bool] = {}
    for row, prompt, answer in rows.pairs:
        asked = prompt.strip()
        if (
            len(asked) >= ASKED
            and len(answer) > len(asked) + 2
            and (at := answer.find(asked[:REPEATED], 0, BEFORE + REPEATED)) >= 0
        ):
            end = at + len(asked[:REPEATED])
            whole = answer.startswith(asked[REPEATED:], end) if len(asked) > REPEATED else True
            behind = answer[at + len(asked) :][:2].lstrip("\"' ”»*") if whole else ""
            if (len(asked) >= COPY and len(answer) > len(prompt) * 0.5 and not whole) or (
                whole and (asked[-1] in "?.!:" or behind[:1] == "\n")
            ):
                found[row] = (part_of[row], at, end)
        if (
            answer[:1] in FIRST_SIGNS
            and (":" in answer[:24] or "：" in answer[:24] or answer[:5] == "Below")
            and (m := LABELLED.match(answer[:600]))
            and not INVITES.search(prompt[:2000])
            and not _explains(answer, m)
        ):
            found.setdefault(row, (part_of[row], 0, m.end()))
    lines = list(answers.near(ROLE_LINE, ROLE_GATES, 24))
    if not answers.foreign.isdisjoint(ROLES_BEYOND):
        places = answers.places("".join(ROLES_BEYOND))
        lines += [m.span() for at in places if (m := ROLE_LINE.search(answers.text, max(0, at - 4), at + 16))]
    if lines:
        asked_of = {row: prompt for row, prompt, _ in rows.pairs}
        for span in sorted(lines):
            row, part, start, end = answers.at(*span)
            if row in found:
                continue
            if row not in invited:
                invited[row] = bool(INVITES.search(asked_of.get(row, "")[-2000:]))
            text = answers.parts[part]
            if (
                not invited[row]
                and not (start == 0 and text[0] != "#" and not LABELLED.match(text))
                and text.count("```", 0, start) % 2 == 0
            ):
                found[row] = (part, start, end)
    return found


def _explains(answer: str, m: re.Match[str]) -> bool:
    """`AI: short for artificial intelligence` is an entry, `AI: Hello.` a turn."""
    return m[0].strip(" :") in ("AI", "Bot") and answer[m.end() :].lstrip()[:1].islower()


def refusal(rows: Rows) -> Hits:
    """At the beginning of an answer, in one line."""
    found: Hits = {}
    answers = rows.answers
    for part, answer in enumerate(answers.parts):
        if not answer[:24].lstrip().lower().replace("\u2019", "'").startswith(REFUSAL_BEGINS):
            continue
        if m := REFUSAL.match(t.lowered(answer[:160].lstrip()).replace("\u2019", "'").replace("\n", " ")):
            skipped = len(answer) - len(answer.lstrip())
            found.setdefault(answers.rows[part], (part, skipped, skipped + m.end()))
    return found


def boilerplate(rows: Rows) -> Hits:
    return rows.answers.find(BOILERPLATE, BOILERPLATE_GATES, 60, lower=True)


def special_tokens(rows: Rows) -> Hits:
    return rows.all.find(SPECIAL, SPECIAL_GATES, 48, good=_is_special)


def _is_special(m: re.Match[str]) -> bool:
    """Not `<s>old</s>`, which strikes text out in HTML and stands within a line, nor `List<s>`."""
    if m[0] not in ("<s>", "</s>"):
        return True
    text, start, end = m.string, m.start(), m.end()
    if m[0] == "<s>":
        closed = STRUCK.match(text, start)
        return not (closed and not WHOLE_LINE.match(text, closed.end())) and not text[max(0, start - 1) : start].isalnum()
    line = text[max(text.rfind("\n", 0, start), start - 120, 0) : start]
    return not re.search(r"<s(?: [^<>]*)?>[^<>]*\Z", line) or bool(WHOLE_LINE.match(text, end) and re.match(r"\n?<s>", line))


def conflict_markers(rows: Rows) -> Hits:
    return rows.all.first(_conflicts(rows.all))


def _conflicts(joined: Joined) -> Iterator[tuple[int, int]]:
    """A marker that another one of its message goes with, or whose label is a branch or a commit: mail quotes with `>` too."""
    if not joined.occurring(("<<<<<<<", ">>>>>>>")):
        return
    for m in CONFLICT.finditer(joined.text):
        _, part, *_ = joined.at(*m.span())
        text = joined.parts[part]
        kinds = {k[1] for k in MARKERS.finditer(text)}
        if {"<", ">"} <= kinds or (len(kinds) > 1 and "=" in kinds) or BRANCH.match(joined.text, m.end()):
            yield m.span()


def mojibake(rows: Rows) -> Hits:
    return rows.all.first(sorted(_damaged(rows.all)))


def _damaged(joined: Joined) -> Iterator[tuple[int, int]]:
    """Looked for only where a first sign is followed by one that may follow it, among the characters that are not ASCII."""
    foreign = joined.foreign
    if not foreign:
        return
    text = joined.text
    if foreign & MOJIBAKE_SIGNS or foreign >= MARK:
        for at in joined.places("\ufffdÃÂâðÐÑï"):
            if m := MOJIBAKE.match(text, at):
                yield m.span()
    for signs, leads, follow, pattern in DAMAGE:
        if not foreign.isdisjoint(signs):
            for at in joined.places(leads, follow):
                if m := pattern.match(text, at):
                    yield m.span()


def control_characters(rows: Rows) -> Hits:
    data = rows.all.squeezed
    return (
        rows.all.find(CONTROL) if len(data.translate(None, CONTROL_BYTES)) < len(data) else {}
    )  # 10 times quicker than the pattern


def invisible(rows: Rows) -> Hits:
    found: Hits = {}
    text = rows.all.text
    for sign in sorted(rows.all.foreign & UNSEEN):
        at = text.find(sign)
        while at >= 0:
            if (m := INVISIBLE.match(text, at, at + 2)) and not is_bidi(m):
                row, *place = rows.all.at(at, at + 1)
                found[row] = min(found.get(row, tuple(place)), tuple(place))
            at = text.find(sign, at + 1)
    return found


def is_bidi(m: re.Match[str]) -> bool:
    """A direction mark among Hebrew or Arabic letters says how they run. An override (U+202D, U+202E) is never needed for that."""
    return m[0] in BIDI and bool(RIGHT_TO_LEFT.search(m.string, max(0, m.start() - 40), m.end() + 40))


# ---- personal data and secrets -------------------------------------------------------------------------------------------------


def email(rows: Rows) -> Hits:
    return rows.all.first(email_spans(rows.all))


def email_spans(joined: Joined) -> Iterator[tuple[int, int]]:
    for m in t.EMAIL_AT.finditer(joined.text) if b"@" in joined.squeezed else ():
        before = m.string[m.start() - 1 : m.start()] if m.start() else ""
        if before.isascii() and (before.isalnum() or before in ("_", "%", "+", "-")) and not t.RESERVED.search(m[0]):
            yield _left(joined.text, m.start()), m.end()


def _left(text: str, at: int) -> int:
    """Where the name before the @ begins."""
    m = re.search(r"[A-Za-z0-9._%+'-]{1,64}\Z", text[max(0, at - 64) : at])
    return at - len(m[0].lstrip("'.+%-")) if m else at  # none begins with a quotation mark


ORDER = re.compile(  # `in order`, `in this case 030 1234567` are none: there a word such as number must stand between
    r"(?:\b(?:(?:(?<!\bin )(?<!\bto )order|invoice|ticket|tracking|isbn|sku|bestell\w*|auftrags?\w*|rechnungs?\w*)"
    r"(?:[ -]?(?:no|nr|number|nummer|id))?\.?"
    r"|(?:case|ref(?:erence)?|serial|part|item|article|model|kunden|vorgangs?)[ -]?(?:no|nr|number|nummer|id)\.?)"
    r"|(?<!#)#|№) ?[:=]? ?\Z",
    re.IGNORECASE,
)


def _is_phone(m: re.Match[str]) -> bool:
    """Not `order 0815-4711-123`: what a number is called decides, unless it begins with a country's code. Nor `0110 1001 0110`,
    `01 02 03 04 05`, or a term of a sum."""
    said = m[0]
    if not t.is_phone(said) or set(said) <= set("01 -/"):
        return False
    before = m.string[max(0, m.start() - 32) : m.start()]
    if m.re is t.ANY_PHONE:
        return bool(t.CALLED.search(before))
    if said[0] == "+":
        return not (said[1:].isdigit() and (len(said) > 14 or re.search(r"\d\s*\Z", before)))
    groups = [int(g) for g in re.findall(r"\d+", said)]
    steps = {b - a for a, b in itertools.pairwise(groups)}
    return not (len(groups) > 2 and len(steps) == 1) and not ORDER.search(before)


NUMBERS = (  # and where a match ends, 0 if it is none
    ("iban", t.IBAN, t.iban_end),
    ("card", t.CARD, lambda m: m.end() if t.is_card(m[0]) else 0),
    ("phone", t.PHONE, lambda m: m.end() if _is_phone(m) else 0),
    ("phone", t.ANY_PHONE, lambda m: m.end() if _is_phone(m) else 0),
)


CALLS = (
    b"tel",
    b"phon",
    b"fon",
    b"mobil",
    b"m\xf3vil",
    b"cell",
    b"handy",
    b"fax",
    b"whats",
    b"call",
    b"ring",
    b"sms",
    b"mero",
    b"??",
)  # of CALLED


def number_spans(joined: Joined) -> Iterator[tuple[str, int, int]]:
    """Phones, cards and IBANs: they lie in the same few stretches with many digits."""
    for low, high in joined.numbers():
        taken: list[tuple[int, int]] = []  # in order, none over another
        for name, pattern, ends in NUMBERS:
            if pattern is t.ANY_PHONE and not any(word in joined.squeezed_lower[max(0, low - 24) : high] for word in CALLS):
                continue
            for m in pattern.finditer(joined.text, low, high):
                start, end = m.start(), ends(m)
                at = bisect(taken, (start, end)) if end else 0
                if end and not (at and taken[at - 1][1] > start) and not (at < len(taken) and taken[at][0] < end):
                    taken.insert(at, (start, end))
                    yield name, start, end


def numbers_of(name: str):
    def detector(rows: Rows) -> Hits:
        known = rows.__dict__.get("_numbers")
        if known is None:
            known = rows.__dict__["_numbers"] = list(number_spans(rows.all))
        return rows.all.first((start, end) for kind, start, end in known if kind == name)

    return detector


def ip_address(rows: Rows) -> Hits:
    return rows.all.first(ip_spans(rows.all))


def ip_spans(joined: Joined) -> Iterator[tuple[int, int]]:
    if t.DOTTED.search(joined.squeezed):
        yield from (m.span() for m in t.IPV4.finditer(joined.text) if t.is_ip(m[0]) and not _version(m))
    yield from _ipv6(joined)


VERSION = re.compile(
    r"(?:(?:version|\brelease|\bbuild|\bver\.?|section|firmware|driver|clause|chapter|\btable|\boid)[\s\"'(:=]{0,3}|§ ?|=="
    r"|[A-Za-z]-)\Z",
    re.IGNORECASE,
)


def _ipv6(joined: Joined) -> Iterator[tuple[int, int]]:
    """Where four colons stand close together, or two side by side behind a digit or a letter."""
    at = np.flatnonzero(np.frombuffer(joined.squeezed, np.uint8) == 58)
    if len(at) < 3:
        return
    near, text = [], joined.text
    if len(at) > 3:
        near = at[:-3][at[3:] - at[:-3] <= 15].tolist()
    near += at[:-1][np.diff(at) == 1].tolist()
    for k in sorted(near):
        for pattern in (t.IPV6, t.IPV6_SHORT):
            m = pattern.search(text, max(0, k - 40), k + 45)
            if m and t.is_ip(m[0]):
                yield m.span()


def _version(m: re.Match[str]) -> bool:
    """`version 1.2.3.4`, `v1.2.3.4`: four numbers that are no address."""
    return bool(
        re.search(VERSION, m.string[max(0, m.start() - 24) : m.start()])
        or re.match(r"\.(?:tar|t?gz|zip|deb|rpm|exe|msi|jar|whl|so|dll|apk|iso)\b", m.string[m.end() : m.end() + 8])
    )


def api_key(rows: Rows) -> Hits:
    return rows.all.first(sorted(key_spans(rows.all)))


NAME_GATES = ("password", "passwd", "secret", "api_key", "apikey", "api-key", "access_key", "_token")
GIVEN = re.compile(rb"[a-z0_.-]{0,30}[\"']?\s{0,4}[=:]")  # behind such a name: a value is given
NO_SECRET = re.compile(
    r"[(){}<>$]|your|example|xxx|•|^[\"']?passw|redacted|^\[KEY(?:_\d+)?\]$", re.IGNORECASE
)  # [KEY_12] is what `prepare` writes


def key_spans(joined: Joined) -> Iterator[tuple[int, int]]:
    text, data, lower = joined.text, joined.squeezed, joined.squeezed_lower
    for gate in joined.occurring(t.KEY_GATES):
        at = data.find(gate)
        while at >= 0:
            if (m := redact.SHAPES.match(text, at)) and len(set(m[0][-12:])) > 2 and not NO_SECRET.search(m[0]):
                yield m.span()
            at = data.find(gate, at + 1)
    for gate in joined.occurring(("://",)) if b"@" in data else ():
        at = data.find(gate)
        while at >= 0:
            near = data.find(b"@", at, at + 160) > 0
            m = redact.URL_LOGIN.search(text, max(0, at - 24), at + 200) if near else None
            if m and m.start() < at < m.end() and _is_secret(m["secret"], m):
                yield m.span("secret")
            at = data.find(gate, at + 1)
    for gate in joined.occurring(("Bearer ", "uthorization")):
        at = data.find(gate)
        while at >= 0:
            if (m := redact.AUTHORIZATION.search(text, at, at + 300)) and _is_secret(m["secret"], m):
                yield m.span("secret")
            at = data.find(gate, at + 1)
    for gate in joined.occurring(NAME_GATES, lower=True):
        at = lower.find(gate)
        while at >= 0:
            if GIVEN.match(lower, at + len(gate)):
                for m in redact.NAMED.finditer(text, max(0, at - 40), at + 300):
                    value = m["secret"].strip("\"'").rstrip(",;.")
                    both = re.search(r"\d", value) and re.search(r"[A-Za-z]", value)
                    if both and len(value) >= 8 and value.isascii() and not NO_SECRET.search(value):
                        yield m.span("secret")
            elif (m := SAID_SO.match(text, at)) and not NO_SECRET.search(m["secret"]):
                yield m.span("secret")
            at = lower.find(gate, at + 1)
    for gate in joined.occurring(("passwort", "kennwort", "mot de passe", "contrase", "senha"), lower=True):
        at = lower.find(gate)
        while at >= 0:
            if (m := SAID_SO.match(text, at)) and not NO_SECRET.search(m["secret"]):
                yield m.span("secret")
            at = lower.find(gate, at + 1)


# `the password is x7Rt-q`: with a digit and a letter, and no word alone
SAID_SO = re.compile(
    r"(?:password|passwd|passwort|kennwort|mot de passe|contraseña|senha)(?: (?:is|ist|lautet|est|es|é)|\s?[:=])\s?[\"'`]?"
    r"(?P<secret>(?=[^\s\"'`]*\d)(?=[^\s\"'`]*[A-Za-z])[^\s\"'`<>(){}$]{6,64})",
    re.IGNORECASE,
)


def _is_secret(value: str, m: re.Match[str]) -> bool:
    """Of a URL or a header: no name of a secret, none for the machine itself, and none without a digit."""
    if m.re is redact.URL_LOGIN:
        good = (
            m["keep"].count(":") == 2
            and len(value) >= 6
            and not re.match(r"@(?:localhost|127\.|[\w.-]*example\.)", m.string[m.end() : m.end() + 40])
        )
    else:
        good = len(value) >= 16
    return good and bool(re.search(r"\d", value)) and bool(re.search(r"[A-Za-z]", value)) and not NO_SECRET.search(value)


PUTTY = re.compile(r"PuTTY-User-Key-File-\d")
KEY_BODY = re.compile(r"(?=[A-Za-z+/=]{0,60}\d)[A-Za-z0-9+/=]{16,}")


def private_key(rows: Rows) -> Hits:
    """With something of the key itself behind the line that begins it: texts about such files show that line alone. Each message
    by itself, since a key that was cut has no end."""
    found: Hits = {}
    if rows.all.occurring(("PRIVATE KEY", "PuTTY-User-Key-File-")):
        for pattern in (redact.PEM_BEGIN, PUTTY):
            for m in pattern.finditer(rows.all.text):
                row, part, start, end = rows.all.at(*m.span())
                body = rows.all.parts[part][end : end + 600].split("-----END")[0]
                if KEY_BODY.search(body):
                    found.setdefault(row, (part, start, end))
    return found

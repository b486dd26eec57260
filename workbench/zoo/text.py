"""A target and two drafts that continue Python's own documentation, and the text they learnt it from.

The text is what every Python carries: the docstrings of the standard library, laid out as `help` does, its longer
comments, and the language reference (`pydoc_data.topics`). Whole documents (one module or topic each) are held out,
by a hash of their names, so a held-out document was not trained on whichever Python reads it.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import sysconfig
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from workbench.zoo import LANGUAGE_SIZES, folder_of

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

SPLITS = ("train", "held_out")
END = "<|endoftext|>"  # the only special token: it begins every document, and so ends the one before
CONTEXT = 1024  # tokens
PROMPT_TOKENS = 32
HELD_OUT_ONE_IN = 10
SHORTEST = 300  # characters; shorter documents are mostly names
COMMENT_LINES = 3  # of the shortest comment taken
LONG_PARAGRAPH = 60  # characters; shorter ones are headings and turns of phrase
EXCLUDED = {"test", "tests", "site-packages", "dist-packages", "idlelib", "lib2to3", "turtledemo", "ensurepip"}
EXCLUDED |= {"pydoc_data", "__pycache__"}


def load_language_model(size: str, **options: Any) -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    """A fresh model of one size, for evaluation, float32 on the CPU, and the tokenizer that all sizes share.

    Args:
        size: "target", "small" or "tiny".
        options: of `from_pretrained`, where the defaults do not suit.

    Raises:
        ValueError: for an unknown size.
    """
    folder = folder_of(size, LANGUAGE_SIZES)
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    is_shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()  # a small file needs none
    try:
        model = AutoModelForCausalLM.from_pretrained(folder, **{"dtype": torch.float32, **options})
    finally:
        if is_shown:
            logging.enable_progress_bar()
    return model.eval(), AutoTokenizer.from_pretrained(folder)


def split_of(name: str) -> str:
    """The split, "train" or "held_out", that the document of this name belongs to, in every Python."""
    digest = hashlib.sha256(f"split {name}".encode()).digest()
    return "held_out" if int.from_bytes(digest[:4], "big") % HELD_OUT_ONE_IN == 0 else "train"


def corpus(split: str) -> list[str]:
    """The documents of a split, in a fixed order: topics of the language reference, then modules, both by name.

    Training modules are followed by their longer comments, as documents of their own. The text is that of the
    running Python, so it differs a little from version to version; the split of a name does not. Takes seconds
    once ("train", 11 MB of source) or .3 s ("held_out"), nothing afterwards.

    Raises:
        ValueError: for an unknown split.
        FileNotFoundError: if this Python carries no sources of its library.
    """
    if split not in SPLITS:
        raise ValueError(f"split is {split!r}; it must be one of {', '.join(map(repr, SPLITS))}")
    return [text for _, text in documents(split)]


@functools.lru_cache(maxsize=2)
def documents(split: str) -> tuple[tuple[str, str], ...]:
    """The (name, text) of each document of a split; see `corpus`."""
    from pydoc_data.topics import topics

    forbidden = {key for _, text in documents("held_out") for key in paragraphs(text)} if split == "train" else set()
    found = [(f"topic {name}", topics[name].strip()) for name in sorted(topics)]
    found = [(name, text) for name, text in found if split_of(name) == split]
    for name, path in _modules():
        if split_of(name) != split:
            continue
        source = path.read_text(encoding="utf-8", errors="replace")
        found.append((name, _documentation(name, source)))
        if split == "train":
            found.append((f"comments {name}", _comments(source)))
    if forbidden:  # topics contain other topics, and modules copy each other's docstrings
        found = [
            (name, "\n\n".join(p for p in text.split("\n\n") if not forbidden & paragraphs(p))) for name, text in found
        ]
    return tuple((name, text) for name, text in found if len(text) >= SHORTEST)


def paragraphs(text: str) -> set[str]:
    """The paragraphs of at least `LONG_PARAGRAPH` characters, with single spaces: what two splits may not share."""
    keys = (" ".join(part.split()) for part in text.split("\n\n"))
    return {key for key in keys if len(key) >= LONG_PARAGRAPH}


def _modules() -> list[tuple[str, Path]]:
    """Dotted name and file of each module of the standard library, tests and build configurations aside."""
    root = Path(sysconfig.get_path("stdlib"))
    found = []
    for path in root.rglob("*.py"):
        parts = path.relative_to(root).with_suffix("").parts
        if not any(part in EXCLUDED or part.startswith(("config-", "_sysconfigdata")) for part in parts):
            found.append((".".join(part for part in parts if part != "__init__"), path))
    if not found:
        raise FileNotFoundError(f"this Python carries no sources of its standard library in {root}")
    return sorted(found)


def _documentation(name: str, source: str) -> str:
    """A module's docstrings as `help` lays them out: signature, then the text indented."""
    try:
        tree = ast.parse(source)
    except SyntaxError:  # a template
        return ""
    text = ast.get_docstring(tree)
    parts = [f"Module {name}\n\n{text}"] if text else []

    def walk(node: ast.AST, owner: str) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.ClassDef):
                bases = f"({', '.join(map(ast.unparse, child.bases))})" if child.bases else ""
                add(child, f"class {owner}{child.name}{bases}")
                walk(child, f"{owner}{child.name}.")
            elif isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
                add(child, f"{owner}{child.name}({_signature(child.args)})")
            elif isinstance(child, ast.If | ast.Try):
                walk(child, owner)

    def add(node: ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef, head: str) -> None:
        text = ast.get_docstring(node)
        if text:
            parts.append(f"{head}\n{textwrap.indent(text, '    ')}")

    walk(tree, "")
    return "\n\n".join(parts).strip()


def _signature(arguments: ast.arguments) -> str:
    for argument in ast.walk(arguments):
        if isinstance(argument, ast.arg):
            argument.annotation = None
    return ast.unparse(arguments)


def _comments(source: str) -> str:
    """The comments of at least `COMMENT_LINES` lines, unmarked, with an empty line between them."""

    def blocks() -> Iterator[str]:
        block: list[str] = []
        for line in [*source.splitlines(), ""]:
            line = line.strip()
            if line.startswith("# ") or line == "#":
                block.append(line[2:])
            else:
                if len(block) >= COMMENT_LINES and not any("opyright" in line for line in block):
                    yield "\n".join(block).strip("\n")
                block = []

    return "\n\n".join(filter(None, blocks()))


def prompts(n: int, seed: int, tokens: int = PROMPT_TOKENS) -> torch.Tensor:
    """Beginnings of held-out documents to decode from: token ids (n, tokens), int64, each starting with `END`.

    Distinct where there are enough documents of that length (about 40), in an order that the seed decides.

    Raises:
        ValueError: if n or tokens is below 1, or tokens above half the context.
    """
    if n < 1:
        raise ValueError(f"n is {n}; it must be at least 1")
    if not 1 <= tokens <= CONTEXT // 2:
        raise ValueError(f"tokens is {tokens}; it must be from 1 to {CONTEXT // 2}")
    beginnings = _beginnings(tokens)
    generator = torch.Generator().manual_seed(seed)
    order = torch.cat([torch.randperm(len(beginnings), generator=generator) for _ in range(-(-n // len(beginnings)))])
    return beginnings[order[:n]]


@functools.lru_cache(maxsize=8)
def _beginnings(tokens: int) -> torch.Tensor:
    encode = encoder()
    rows = [encode(text[: 16 * tokens])[:tokens] for text in corpus("held_out")]
    return torch.tensor([row for row in rows if len(row) == tokens])


def encoder(folder: Path | None = None) -> Callable[[str], list[int]]:
    """The tokenizer of a folder (default: the target's) as a function: `END`'s id and those of the text."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str((folder or folder_of("target")) / "tokenizer.json"))
    end = tokenizer.token_to_id(END)
    assert end is not None, f"the tokenizer lacks {END}"
    return lambda text: [end, *tokenizer.encode(text, add_special_tokens=False).ids]

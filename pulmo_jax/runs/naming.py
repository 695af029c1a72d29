"""Names of output files: no two inputs share one.

An input keeps its first name, such as `a` for a.tif. Inputs whose output files would coincide take their next names,
such as `a.tif` and `a.png`; if these coincide too, or are too long for a file system, the name ends in `~` and a digest
of the exact name and page of the input. Names are taken to coincide if they differ only by case, Unicode normalisation,
or dots and spaces at their ends, because some file systems do not distinguish them.

So the names depend on the inputs of a call. If a later call adds a.png beside a.tif, the results of a.tif move from `a`
to `a.tif` and are computed again. A record lists its output files, and a call that writes a file of another input's
record removes that record first (see `runs.records`): a file is never taken for the result of another input.
"""

import hashlib
import unicodedata
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from pathlib import PurePosixPath

from pulmo_jax.data.images import ImageRef
from pulmo_jax.data.sources import stem

LONGEST_BYTES = 200  # of a file name, which leaves room for suffixes and temporary names within 255 bytes
KEPT_BYTES = 120  # of a name that is shortened
DIGITS = 8  # of the digest


def output_names(
    inputs: Sequence[Sequence[str]], identities: Sequence[str], files_of: Callable[[int, str], Iterable[str]]
) -> list[str]:
    """Choose the name of the output files of every input; it depends on the set of inputs and not on their order.

    Args:
        inputs: Names of each input in the order of preference.
        identities: Text that is unique to each input.
        files_of: Paths of the output files of an input, given its index and name.

    Returns:
        One name for each input.
    """
    choices = [(*names, digested(names[-1], text)) for names, text in zip(inputs, identities, strict=True)]
    level = [next(i for i, name in enumerate(names) if i == len(names) - 1 or is_short(name)) for names in choices]
    while True:
        names = [choice[k] for choice, k in zip(choices, level, strict=True)]
        clashing = find_clashes(
            [sorted({*files_of(i, caseless(name)), *files_of(i, folded(name))}) for i, name in enumerate(names)]
        )
        moved = [i for i in clashing if level[i] < len(choices[i]) - 1]
        if not moved:
            return names
        for i in moved:
            level[i] += 1


def page_names(refs: Sequence[ImageRef]) -> list[str]:
    """Choose one name for the output file of every page: its file name without suffix, or with it (see above)."""
    choices = [[without_suffix(ref), ref.file_name] for ref in refs]
    return output_names(choices, [ref.identity for ref in refs], lambda _, name: [f"{name}.tif"])


def without_suffix(ref: ImageRef) -> str:
    """File name without the image suffix, with the page if there are several."""
    return stem(ref.name) if ref.pages == 1 else f"{stem(ref.name)}_{ref.page:04d}"


def find_clashes(files: Sequence[Sequence[str]]) -> set[int]:
    """Find the inputs of which an output file is also a file of another input, or a folder of its files.

    Args:
        files: Paths of the output files of each input.

    Returns:
        Indices of these inputs.
    """
    owners, folders = defaultdict(set), defaultdict(set)
    for i, paths in enumerate(files):
        for path in paths:
            owners[path].add(i)
            for parent in PurePosixPath(path).parents:
                folders[str(parent)].add(i)
    return {
        i for path, having in owners.items() for i in having | folders[path] if len(having) > 1 or path in folders
        if len(having | folders[path]) > 1
    }  # fmt: skip


def caseless(name: str) -> str:
    """What is left of a name on a file system without case and normalisation."""
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", name).casefold())


def folded(name: str) -> str:
    """The same without dots and spaces at the end of a name, which some file systems drop."""
    return "/".join(part.rstrip(". ") for part in caseless(name).split("/"))


def is_short(name: str) -> bool:
    """Whether all parts of a name leave room for suffixes."""
    return all(len(part.encode(errors="surrogateescape")) <= LONGEST_BYTES for part in name.split("/"))


def digested(name: str, identity: str) -> str:
    """The name with a digest of a text that is unique to the input; a long file name is shortened."""
    folder, slash, last = name.rpartition("/")
    kept = last.encode(errors="surrogateescape")[:KEPT_BYTES].decode(errors="ignore") if not is_short(last) else last
    return f"{folder}{slash}{kept}~{hashlib.sha256(identity.encode(errors='surrogateescape')).hexdigest()[:DIGITS]}"

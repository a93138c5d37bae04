"""The text: two public-domain books that Debian packages ship, cleaned and split.

Source: bible-kjv-text 4.38 (King James Version, 1611; "the copyright has expired", debian/copyright) and
        dict-gcide 0.48.5+nmu2. GCIDE as a collection is GPL-2+; only what it marks [1913 Webster] or [Webster
        1913 Suppl.] with no other hand named is kept: the text of Webster's Revised Unabridged Dictionary of
        1913, out of copyright. Definitions from WordNet, PJC and others are dropped.
Units:  a document is a chapter ("Acts 1", then one verse a line) or a dictionary entry (one sense a line).
Fails:  Missing when nothing can be fetched, Corrupt when a SHA-256 differs; both say the way out.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import os
import re
import struct
import subprocess
import tarfile
import urllib.request
from dataclasses import dataclass
from pathlib import Path

from wherry.errors import Corrupt, Missing

POOLS = (
    "https://deb.debian.org/debian/pool/main",
    "http://deb.debian.org/debian/pool/main",
    "https://snapshot.debian.org/archive/debian/20250101T000000Z/pool/main",
)
SEARCH_BOOK, HELD_OUT_BOOK = "Romans", "Acts"  # search: to choose settings by; held out: only to report
SEARCH_LETTER, HELD_OUT_LETTER = "K", "J"
HELD_OUT_QUOTES = r"--\s?(Acts|Rom\.|Romans)"  # the dictionary cites the Bible, but must not cite these
KEPT_TAGS = {"1913 Webster", "Webster 1913 Suppl."}
_BOOKS = """
Ge=Genesis, Exo=Exodus, Lev=Leviticus, Num=Numbers, Deu=Deuteronomy, Josh=Joshua, Jdgs=Judges, Ruth=Ruth,
1Sm=1 Samuel, 2Sm=2 Samuel, 1Ki=1 Kings, 2Ki=2 Kings, 1Chr=1 Chronicles, 2Chr=2 Chronicles, Ezra=Ezra,
Neh=Nehemiah, Est=Esther, Job=Job, Psa=Psalms, Prv=Proverbs, Eccl=Ecclesiastes, SSol=Song of Solomon,
Isa=Isaiah, Jer=Jeremiah, Lam=Lamentations, Eze=Ezekiel, Dan=Daniel, Hos=Hosea, Joel=Joel, Amos=Amos,
Obad=Obadiah, Jonah=Jonah, Mic=Micah, Nahum=Nahum, Hab=Habakkuk, Zep=Zephaniah, Hag=Haggai, Zec=Zechariah,
Mal=Malachi, Mat=Matthew, Mark=Mark, Luke=Luke, John=John, Acts=Acts, Rom=Romans, 1Cor=1 Corinthians, 2Cor=2
Corinthians, Gal=Galatians, Eph=Ephesians, Phi=Philippians, Col=Colossians, 1Th=1 Thessalonians, 2Th=2
Thessalonians, 1Tim=1 Timothy, 2Tim=2 Timothy, Titus=Titus, Phmn=Philemon, Heb=Hebrews, Jas=James, 1Pet=1
Peter, 2Pet=2 Peter, 1Jn=1 John, 2Jn=2 John, 3Jn=3 John, Jude=Jude, Rev=Revelation
"""
BOOKS = dict(re.findall(r"(\w+)=(\w[\w ]*)", " ".join(_BOOKS.split())))  # as bible.data abbreviates them


@dataclass(frozen=True)
class Source:
    """One file inside one Debian package, pinned by the SHA-256 of that file."""

    package: str
    url: str  # below a Debian pool
    member: str  # path inside the package, and on a machine where it is installed
    sha256: str
    licence: str


KJV = Source(
    "bible-kjv-text 4.38",
    "b/bible-kjv/bible-kjv-text_4.38_all.deb",
    "usr/lib/bible.data",
    "6c746c2acc8a34bfded980883ff1701a5d68934a1c853ebf88a07b978fe0ae0e",
    "public domain (translation of 1611; in the United Kingdom the Crown holds letters patent to print it)",
)
GCIDE = Source(
    "dict-gcide 0.48.5+nmu2",
    "d/dict-gcide/dict-gcide_0.48.5+nmu2_all.deb",
    "usr/share/dictd/gcide.dict.dz",
    "3e6b2cdcbc1b3664c2f1466e3c8e44012e815c4c67fa83fa61f39777cd6e8517",
    "public domain (only the text of the 1913 dictionary is used; GCIDE as a collection is GPL-2+)",
)


def fetch(source: Source, cache: Path, given: Path | None = None) -> bytes:
    """Return the pinned file: from `given`, the cache, the installed package, or a Debian mirror."""
    name = Path(source.member).name
    for path in [given / name] if given else [cache / name, Path("/") / source.member]:
        if path.is_file():
            return checked(path.read_bytes(), source, str(path))
    if given:
        raise Missing(
            f"{given / name} is absent.\nExtract {source.member} of Debian package {source.package} to it."
        )
    reasons = []
    for pool in POOLS:
        try:
            with urllib.request.urlopen(f"{pool}/{source.url}", timeout=60) as answer:
                data = checked(deb_member(answer.read(), source.member), source, f"{pool}/{source.url}")
            cache.mkdir(parents=True, exist_ok=True)
            (cache / f"{name}.part").write_bytes(data)
            (cache / f"{name}.part").rename(cache / name)
            return data
        except OSError as error:
            reasons.append(f"{pool}: {error}")
    raise Missing(
        f"Cannot fetch {source.package}: {'; '.join(reasons)}.\nWithout a network: apt-get download it "
        f"elsewhere, dpkg -x it, and pass --text FOLDER with {name} inside."
    )


def checked(data: bytes, source: Source, where: str) -> bytes:
    """Return `data` if its SHA-256 is the pinned one."""
    got = hashlib.sha256(data).hexdigest()
    if got != source.sha256:
        raise Corrupt(
            f"{where} is not the file of {source.package}: SHA-256 {got[:16]}..., pinned "
            f"{source.sha256[:16]}...\nDelete it, or pass --text FOLDER with the pinned version."
        )
    return data


def deb_member(deb: bytes, member: str) -> bytes:
    """Extract one file of a .deb: an `ar` archive (60-byte headers, even offsets) that holds data.tar.*."""
    at = 8
    while at < len(deb):
        name, size = deb[at : at + 16].decode().strip().rstrip("/"), int(deb[at + 48 : at + 58])
        if name.startswith("data.tar"):
            with tarfile.open(fileobj=io.BytesIO(deb[at + 60 : at + 60 + size])) as tar:
                found = tar.extractfile(f"./{member}")
                if found is not None:
                    return found.read()
        at += 60 + size + size % 2
    raise Corrupt(f"{member} is not inside the package.")


def read_kjv(data: bytes) -> dict[str, list[str]]:
    """Decode bible.data into {book: [chapter]}.

    Units: big-endian; at 0x50 version, at 0x54 bytes of a window, at 0x58 number of windows, then their
           offsets; a window is the body of a compress(1) stream that lacks its three header bytes. A line is
           "Acts1:1 The former ...".
    """
    count = struct.unpack(">I", data[0x58:0x5C])[0]
    starts = struct.unpack(f">{count}I", data[0x5C : 0x5C + 4 * count])
    windows = [b"\x1f\x9d\x90" + data[a:b] for a, b in zip(starts, (*starts[1:], len(data)), strict=True)]
    text = b"".join(
        subprocess.run(["gzip", "-dc"], input=w, capture_output=True, check=True).stdout for w in windows
    )
    books: dict[str, list[str]] = {name: [] for name in BOOKS.values()}
    last = ""
    for abbreviation, chapter, verse in re.findall(
        r"^(\d?[A-Za-z]+?)(\d+):\d+ (.+)$", text.decode("ascii"), re.M
    ):
        head = f"{BOOKS[abbreviation]} {chapter}"
        if head != last:
            books[BOOKS[abbreviation]].append(head)
        books[BOOKS[abbreviation]][-1] += "\n" + re.sub(r"\s+", " ", verse).strip()
        last = head
    return books


def read_gcide(data: bytes) -> list[str]:
    """Decode gcide.dict.dz into the entries of 1913, each `Headword, n. Definition`, a sense a line."""
    text = gzip.decompress(data).decode("utf-8", "replace")
    text = text[text.index("\nA \\A\\") :]  # after the front matter
    entries = [entry(block) for block in re.split(r"\n\n(?=\S)", text)]
    return [e for e in entries if e]


def entry(block: str) -> str:
    """Clean one block, '' unless its first sense is of 1913: no pronunciation, etymology or markup."""
    block = re.sub(
        r"\[[^\w\s\]{]*([a-zA-Z]{1,3})[^\w\s\]{]*\](?=\w|[\"`*'|,)\\ -])|\[[^\w\s\]{]+([a-zA-Z]{1,2})\]",
        r"\1\2",
        block,
    )  # [=a], [a^], ['e], [oe]: the letter alone
    match = re.match(r"([^\\]{1,60}?) ?\\[^\\]*\\([^\n]*(?:\n(?!\n)[^\n]*)*)", block)
    if not match:
        return ""
    head = match[1].strip()
    groups, group = [], []
    for paragraph in re.split(r"\n\s*\n", block[match.end(1) :]):
        tag = re.search(
            r"\[((?:Webster )?(?:1913|WordNet|PJC|AS|RP|JC|Century|RH|MW)[^\]]*)\][^\]]*$", paragraph
        )
        group.append(paragraph[: tag.start()] if tag else paragraph)
        if tag:
            if tag[1] in KEPT_TAGS:
                groups.append(group)
            elif not groups:
                return ""
            group = []
    lines = [clean(p) for g in groups for p in g]
    return clean_head(head, [line for line in lines if line and not re.search(HELD_OUT_QUOTES, line)])


def clean(paragraph: str) -> str:
    """Strip pronunciations, bracketed notes (nested) and cross-reference braces; join the lines."""
    text = re.sub(r"\\[^\\]*\\", "", paragraph)
    for _ in range(4):
        text = re.sub(r"\[[^\[\]]*\]", "", text)
    text = re.sub(r"[{}\\]|(?<=[A-Za-z])[*\"`](?=[A-Za-z])", "", text)  # braces, stress and syllable marks
    text = re.sub(r"\s+", " ", text)
    return re.sub(r" +([,.;:?])", r"\1", text).replace('`"', '"').strip(" ,;")


def clean_head(head: str, lines: list[str]) -> str:
    """Put the headword before the first line; '' if what is left is not a readable definition."""
    if not lines:
        return ""
    first = (
        re.sub(r"^[^\w(]*(?:\([^()]*\)[, ]*)?", "", lines[0], count=1) if lines[0][:1] in "(,;" else lines[0]
    )
    body = "\n".join([f"{head}, {first}", *lines[1:]])
    return body if len(body) > 30 and not re.search(r"[\[\]]", body) and body.isascii() else ""


def split(books: dict[str, list[str]], entries: list[str], keep_one_in: int) -> dict[str, list[str]]:
    """Split into {part: documents}; of the training letters one entry in `keep_one_in` is kept, by hash."""

    def letter(e: str) -> str:
        return e[0].upper()

    def kept(e: str) -> bool:
        return int.from_bytes(hashlib.sha256(e.encode()).digest()[:4], "big") % keep_one_in == 0

    held = {SEARCH_BOOK, HELD_OUT_BOOK}
    return {
        "bible": [c for name, chapters in books.items() if name not in held for c in chapters],
        "dictionary": [e for e in entries if letter(e) not in {SEARCH_LETTER, HELD_OUT_LETTER} and kept(e)],
        "search_book": books[SEARCH_BOOK],
        "search_letter": [e for e in entries if letter(e) == SEARCH_LETTER],
        "held_out_book": books[HELD_OUT_BOOK],
        "held_out_letter": [e for e in entries if letter(e) == HELD_OUT_LETTER],
    }


def corpus(folder: Path, one_in: int, given: Path | None) -> dict[str, list[str]]:
    """Read, clean and split the text; write the parts kept apart as files, documents on blank lines apart."""
    books = read_kjv(fetch(KJV, folder / "text", given))
    entries = read_gcide(fetch(GCIDE, folder / "text", given))
    parts = split(books, entries, one_in)
    for name, documents in parts.items():
        if name.startswith(("search", "held_out")):
            write(folder / "heldout" / f"{name}.txt", "\n\n".join(documents) + "\n")
    return parts


def write(path: Path, content: str) -> None:
    """Write a text file under a temporary name, then rename it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_text(content, encoding="utf-8")
    os.replace(part, path)

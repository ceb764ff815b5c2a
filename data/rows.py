"""Files → JSON values, each with the number of the line it begins on.

JSON lines (an object may stand on several), one JSON array, .csv and .tsv tables, any of them
packed by gzip; .parquet where the optional package pyarrow is installed.
"""

import csv
import gzip
import importlib
import io
import json
import re
import zlib
from pathlib import Path

SEPARATORS = {".csv": ",", ".tsv": "\t"}
ARROW = "an Arrow file, write it as JSON lines first (datasets: from_file(FILE).to_json(OUT))"
FOREIGN = {  # a file's first bytes → what it is, what to do
    b"BZh": "a bzip2 file, unpack it first (bunzip2)",
    b"\xfd7zXZ": "an xz file, unpack it first (unxz)",
    b"\x28\xb5\x2f\xfd": "a zstd file, unpack it first (unzstd)",
    b"PK\x03\x04": "a zip file (a spreadsheet is one too), unpack or export it first",
    b"ARROW1": ARROW,
    b"\xff\xff\xff\xff": ARROW,
    b"\xff\xfe": "UTF-16 text, save it as UTF-8",
    b"\xfe\xff": "UTF-16 text, save it as UTF-8",
}


def read(path):
    """Yields (line number, JSON value). ValueError "file:line: what was expected",
    FileNotFoundError. A BOM and CRLF are tolerated."""
    path = Path(path)
    data = _bytes(path)
    if data.startswith(b"PAR1"):
        yield from enumerate(_parquet(path), 1)
        return
    text = _decode(path, data)
    separator = SEPARATORS.get(ending(path))
    if separator:
        yield from _table(path, text, separator)
    else:
        yield from (_array if text.lstrip()[:1] == "[" else _lines)(path, text)


def ending(path) -> str:
    """A file's ending, .gz aside."""
    return Path(Path(path).name.lower().removesuffix(".gz")).suffix


def decoded(path) -> str:
    """A whole file's text."""
    return _decode(path, _bytes(Path(path)))


def _bytes(path):
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    data = path.read_bytes()
    if not data.startswith(b"\x1f\x8b"):
        return data
    try:
        return gzip.decompress(data)
    except (OSError, EOFError, zlib.error) as e:
        raise ValueError(f"{path}: a whole gzip file was expected ({e}): get it again") from None


def _decode(path, data):
    for sign, advice in FOREIGN.items():
        if data.startswith(sign):
            expected = "JSON lines, one JSON array or a table were expected"
            raise ValueError(f"{path}: {advice}; {expected}")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as e:
        line = data.count(b"\n", 0, e.start) + 1
        raise ValueError(
            f"{path}:{line}: UTF-8 was expected (got the byte 0x{data[e.start]:02x}): save the file"
            " as UTF-8"
        ) from None


def _lines(path, text):
    """JSON lines; an object that stands on several is one value."""
    at, n = 0, 1
    while at < len(text):
        end = text.find("\n", at) % (len(text) + 1)  # splitlines() would cut at a string's U+2028
        line = text[at:end]
        if line.strip():
            try:
                value = json.loads(line)
            except (ValueError, RecursionError) as e:
                value, end = _on_several(text, at, end)
                if not end:
                    expected = "one JSON object per line was expected"
                    raise ValueError(f"{path}:{n}: {expected} ({e})") from None
            yield n, value
        n += text.count("\n", at, end + 1)
        at = end + 1


def _on_several(text, at, end):
    """The object that begins on the line text[at:end] and ends on a later one → it and the end of
    that line; None, 0 where there is none."""
    begin = at + len(text[at:end]) - len(text[at:end].lstrip())
    try:
        value, stop = json.JSONDecoder().raw_decode(text, begin)
    except (ValueError, RecursionError):
        return None, 0
    line_end = text.find("\n", stop) % (len(text) + 1)
    whole = stop > end and not text[stop:line_end].strip()
    return (value, line_end) if whole else (None, 0)


def _array(path, text):
    """The elements of a JSON array."""
    decoder = json.JSONDecoder()
    space = re.compile(r"[ \t\r\n]*")
    at = space.match(text, text.index("[") + 1).end()
    line, counted = 1, 0
    separator = ","
    while text[at : at + 1] != "]":
        line += text.count("\n", counted, at)
        counted = at
        if separator != ",":
            got = text[at : at + 20]
            raise ValueError(
                f"{path}:{line}: a comma or the array's end was expected (got {got!r})"
            )
        try:
            value, at = decoder.raw_decode(text, at)
        except (ValueError, RecursionError) as e:
            raise ValueError(f"{path}:{line}: a JSON object was expected ({e})") from None
        yield line, value
        at = space.match(text, at).end()
        separator = text[at : at + 1]
        if separator == ",":
            at = space.match(text, at + 1).end()
    rest = text[at + 1 :].strip()
    if rest:
        line = text.count("\n", 0, at) + 1
        raise ValueError(f"{path}:{line}: nothing was expected after the array (got {rest[:20]!r})")


def _table(path, text, separator):
    """A table's rows as objects; a column without a name, as pandas writes its index, is left
    out."""
    csv.field_size_limit(2**31 - 1)
    rows = csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True)
    line, header = 1, None
    try:
        for row in rows:
            if header is None:
                header = row
            elif row and len(row) != len(header):
                cells = f"{len(header)} cells, as many as names in line 1, were expected"
                raise ValueError(f"{path}:{line}: {cells} (got {len(row)})")
            elif row:
                cells = zip(header, row, strict=True)
                yield line, {name: _cell(cell) for name, cell in cells if name}
            line = rows.line_num + 1
    except csv.Error as e:
        raise ValueError(f"{path}:{line}: a table's row was expected ({e})") from None


def _cell(text):
    """A cell's text; a list of messages where it is the JSON of one."""
    if not re.match(r"\s*\[\s*\{", text):
        return text
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return text
    return found if all({"role", "from"} & {*m} for m in found if isinstance(m, dict)) else text


def _parquet(path):
    try:
        parquet = importlib.import_module("pyarrow.parquet")
    except ImportError:
        install = "the package pyarrow reads it: pip install pyarrow"
        raise ValueError(f"{path}: a Parquet file, {install}") from None
    try:
        for part in parquet.ParquetFile(path).iter_batches():
            yield from part.to_pylist()
    except (OSError, ValueError) as e:
        raise ValueError(f"{path}: a Parquet file was expected ({e})") from None

import bz2
import gzip
import io
import lzma
import tarfile
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from bigbatch.data.tar import BLOCK, TarError, _header, members, write_end, write_member


def read_all(data: bytes) -> list[tuple[str, bytes]]:
    found = []
    file = io.BytesIO(data)
    for member in members(file, len(data)):
        found.append((member.name, file.read(member.size)))
        assert data[member.offset : member.offset + member.size] == found[-1][1]
    return found


def archive(*files: tuple[str, bytes]) -> bytes:
    out = io.BytesIO()
    for name, data in files:
        write_member(out, name, data)
    out.write(bytes(2 * BLOCK))
    return out.getvalue()


# Short and very long names, with folders and with letters beyond ASCII.
NAMES = st.lists(st.text("abcé字", min_size=1, max_size=120), min_size=1, max_size=3).map("/".join)
FILES = st.lists(st.tuples(NAMES, st.binary(max_size=1500)), max_size=6)


@settings(max_examples=60, deadline=None)
@given(FILES, st.sampled_from([tarfile.PAX_FORMAT, tarfile.GNU_FORMAT]))
def test_reads_what_python_writes(files: list[tuple[str, bytes]], style: int) -> None:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=style) as tar:
        for name, data in files:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            info.mtime = 12.5  # a fraction makes pax write an extended header
            tar.addfile(info, io.BytesIO(data))
    assert read_all(out.getvalue()) == files


ASCII = st.text(st.characters(codec="ascii"), max_size=102)


@given(st.one_of(ASCII, NAMES), st.one_of(st.integers(0, 1 << 20), st.integers(0, 1 << 35)))
@example("a" * 100, (1 << 33) - 1)
@example("a" * 101, 1 << 33)
def test_headers_are_those_of_python(name: str, size: int) -> None:
    info = tarfile.TarInfo(name)
    info.size = size
    assert _header(name, size) == info.tobuf(tarfile.PAX_FORMAT)


def test_reads_the_ustar_prefix_and_links_and_passes_over_folders() -> None:
    name = "a" * 90 + "/" + "b" * 90
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        folder, link = tarfile.TarInfo("folder"), tarfile.TarInfo("in/link")
        folder.type, link.type, link.linkname = tarfile.DIRTYPE, tarfile.SYMTYPE, "../x"
        hard = tarfile.TarInfo("in/hard")
        hard.type, hard.linkname = tarfile.LNKTYPE, "x"
        for info in (folder, tarfile.TarInfo(name), link, hard):
            tar.addfile(info)
    assert read_all(out.getvalue()) == [(name, b""), ("in/link", b""), ("in/hard", b"")]
    found = list(members(io.BytesIO(out.getvalue()), len(out.getvalue())))
    assert [member.link for member in found] == [None, "in/../x", "x"]


@pytest.mark.parametrize("style", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_long_names_of_links(style: int) -> None:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=style) as tar:
        for name in ("short", "n" * 150, "é" * 70):
            link = tarfile.TarInfo(name)
            link.type, link.linkname = tarfile.LNKTYPE, name + "l" * 120
            tar.addfile(link)
        tar.addfile(tarfile.TarInfo("last"))
    found = list(members(io.BytesIO(out.getvalue()), len(out.getvalue())))
    names = ["short", "n" * 150, "é" * 70]
    assert [(m.name, m.link) for m in found] == [
        *((name, name + "l" * 120) for name in names),
        ("last", None),
    ]


def test_a_sparse_file_in_pax_is_refused() -> None:
    """Its data begin with a map of the holes, which is no part of the file."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as tar:
        info = tarfile.TarInfo("GNUSparseFile.7/a.jpg")
        info.pax_headers = {"GNU.sparse.major": "1", "GNU.sparse.name": "a.jpg"}
        tar.addfile(info)
    with pytest.raises(TarError, match="a sparse file is not supported"):
        read_all(out.getvalue())


@settings(max_examples=40, deadline=None)
@given(FILES)
def test_python_reads_what_we_write(files: list[tuple[str, bytes]]) -> None:
    data = archive(*files)
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        found = [(m.name, tar.extractfile(m).read()) for m in tar]  # type: ignore[union-attr]
    assert found == files
    assert read_all(data) == files
    assert archive(*files) == data


THREE = archive(("a.jpg", b"x" * 700), ("b.jpg", b"y" * 100), ("c.jpg", b"z" * 513))


@settings(deadline=None)
@given(st.integers(0, len(THREE) - 1))
def test_every_cut_is_found(length: int) -> None:
    with pytest.raises(TarError):
        read_all(THREE[:length])


@settings(deadline=None)
@given(st.integers(0, BLOCK - 1), st.integers(1, 255))
def test_every_flip_in_a_header_is_found_or_harmless(byte: int, flip: int) -> None:
    damaged = bytearray(THREE)
    damaged[1536 + byte] ^= flip  # the header of b.jpg
    found = read_until_error(bytes(damaged))
    harmless = read_all(THREE)  # such as a space for the NUL behind a number
    assert found in (harmless, [*harmless[:1], "at byte 1,536: invalid header"])


def read_until_error(data: bytes) -> list[object]:
    found: list[object] = []
    file = io.BytesIO(data)
    try:
        found.extend((m.name, file.read(m.size)) for m in members(file, len(data)))
    except TarError as error:
        found.append(str(error).partition(";")[0])
    return found


def test_an_invalid_header_in_the_middle_is_an_error_though_tarfile_sees_the_end() -> None:
    damaged = bytearray(THREE)
    damaged[1536] ^= 1
    with tarfile.open(fileobj=io.BytesIO(damaged)) as tar:
        assert tar.getnames() == ["a.jpg"]  # why this reader exists
    assert read_until_error(bytes(damaged)) == [
        ("a.jpg", b"x" * 700),
        "at byte 1,536: invalid header",
    ]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "without the end mark"),
        (THREE[:-BLOCK], "without the end mark"),
        (THREE + THREE, "data follow the end mark"),
        (THREE[: -2 * BLOCK] + bytes(BLOCK) + THREE, "an empty block stands between members"),
        (b"this is no archive" * 100, "at byte 0: invalid header"),
    ],
)
def test_endings(data: bytes, message: str) -> None:
    with pytest.raises(TarError, match=message):
        read_all(data)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (gzip.compress(THREE), "the file is gzip-compressed; decompress it"),
        (bz2.compress(THREE) * 9, "the file is bzip2-compressed; decompress it"),
        (lzma.compress(THREE) * 9, "the file is xz-compressed; decompress it"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "a Git LFS pointer"),
    ],
)
@pytest.mark.parametrize("size", [0, BLOCK], ids=["as it is", "as long as a header"])
def test_what_is_called_tar_and_is_none(data: bytes, message: str, size: int) -> None:
    with pytest.raises(TarError, match=f"at byte 0: .*{message}"):
        read_all(data.ljust(size, b"\0"))


def test_a_volume_name_is_no_member() -> None:
    label = tarfile.TarInfo("my volume")
    label.type = b"V"
    assert read_all(label.tobuf(tarfile.GNU_FORMAT) + THREE) == read_all(THREE)


def test_padding_behind_the_end_mark_is_fine() -> None:
    assert read_all(THREE + bytes(9000)) == read_all(THREE)


def test_sizes_in_base_256_and_sizes_beyond_the_file() -> None:
    info = tarfile.TarInfo("big.jpg")
    info.size = 1 << 40
    header = info.tobuf(tarfile.GNU_FORMAT)
    with pytest.raises(TarError, match=r"1,099,511,627,776 bytes reaches beyond"):
        read_all(header + bytes(1024))
    info = tarfile.TarInfo("sparse")
    info.type = tarfile.GNUTYPE_SPARSE
    with pytest.raises(TarError, match="not supported"):
        read_all(info.tobuf(tarfile.GNU_FORMAT) + bytes(1024))


def test_write_end_leaves_a_whole_archive(tmp_path: Path) -> None:
    path = tmp_path / "x.tar"
    with path.open("wb") as file:
        write_member(file, "a.cls", b"3")
        write_end(file)
        assert read_all(path.read_bytes()) == [("a.cls", b"3")]

"""Small valid files of every supported format, written by the libraries of these formats."""

import gzip
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from io import BytesIO

import imagecodecs
import nibabel
import numpy as np
import tifffile
from astropy.io import fits
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from pydicom import Dataset, dcmread
from pydicom.dataset import FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.uid import (
    CTImageStorage,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGBaseline8Bit,
    RLELossless,
    generate_uid,
)


@dataclass(frozen=True)
class Seed:
    """checked: byte ranges whose damage a checksum shows; header: bytes in which most of the format's fields lie.

    dims: numbers of axes asked of `read_array`; None: an image, read by `open_source`.
    """

    name: str
    content: bytes
    header: int
    checked: tuple[tuple[int, int], ...] = ()
    dims: tuple[int, ...] | None = None

    @property
    def zipped(self) -> bool:
        return self.content.startswith(b"\x1f\x8b")


def make_seeds() -> dict[str, list[Seed]]:
    rng = np.random.default_rng(0)
    makers: dict[str, Callable[[np.random.Generator], list[Seed]]] = {
        "TIFF": tiffs,
        "PNG": pngs,
        "JPEG": jpegs,
        "DICOM": dicoms,
        "NIfTI": niftis,
        "FITS": fits_files,
        "npy": npys,
        "text": texts,
    }
    return {name: make(rng) for name, make in makers.items()}


def smooth(rng: np.random.Generator, shape: tuple[int, ...], dtype: str) -> np.ndarray:
    """A ramp with noise, so that every codec has something to do."""
    ramp = np.linspace(0, 200, int(np.prod(shape))).reshape(shape)
    return (ramp + rng.uniform(0, 50, shape)).astype(dtype)


def whole(content: bytes) -> tuple[tuple[int, int], ...]:
    return ((0, len(content)),)


# TIFF


def tiffs(rng: np.random.Generator) -> list[Seed]:
    grey, stack, colour = smooth(rng, (40, 30), "u2"), smooth(rng, (3, 40, 30), "u2"), smooth(rng, (40, 30, 3), "u1")
    tile = {"tile": (16, 16)}
    rgb, plain = {"photometric": "rgb", **tile}, {"photometric": "minisblack"}
    palette = {"photometric": "palette", "colormap": rng.integers(0, 2**16, (3, 256), "u2")}
    variants: dict[str, tuple[np.ndarray, dict]] = {
        "strips": (grey, {"rowsperstrip": 8}),
        "big_endian": (grey, {"byteorder": ">", "rowsperstrip": 8}),
        "deflate_tiles": (colour, {**rgb, "compression": "deflate"}),
        "deflate_predictor": (
            smooth(rng, (40, 30), "f4"),
            {"compression": "deflate", "predictor": 3, "rowsperstrip": 9},
        ),
        "lzw_predictor": (grey, {"compression": "lzw", "predictor": 2, "rowsperstrip": 16}),
        "packbits": (grey, {"compression": "packbits"}),
        "jpeg_tiles": (colour, {**rgb, "compression": "jpeg"}),
        "jpeg2000": (colour, {**rgb, "compression": "jpeg2000"}),
        "webp": (colour, {**rgb, "compression": "webp"}),
        "png": (colour, {**rgb, "compression": "png"}),
        "zstd": (grey, {"compression": "zstd", **tile}),
        "lzma": (grey, {"compression": "lzma"}),
        "lerc": (grey, {"compression": "lerc", **tile}),
        "bigtiff_pages": (stack, {"bigtiff": True, "rowsperstrip": 8, **plain}),
        "imagej": (stack, {"imagej": True}),
        "palette": (smooth(rng, (40, 30), "u1"), {**palette, "compression": "deflate"}),
        "cmyk": (smooth(rng, (40, 30, 4), "u1"), {"photometric": "separated"}),
        "planes": (smooth(rng, (3, 40, 30), "u1"), {"photometric": "rgb", "planarconfig": "separate", **tile}),
        "signed": (grey.astype("i4"), {"compression": "deflate", "extratags": [(42113, 2, 4, "-99", True)], **tile}),
        "aperio": (colour, {**rgb, "compression": "jpeg", "description": "Aperio Image Library"}),
    }
    seeds = [tiff(name, pixels, options) for name, (pixels, options) in variants.items()]
    bits = BytesIO()
    Image.fromarray(grey > 100).save(bits, "TIFF", compression="group4")
    return [*seeds, Seed("group4", bits.getvalue(), 400)]


def tiff(name: str, pixels: np.ndarray, options: dict) -> Seed:
    file = BytesIO()
    tifffile.imwrite(file, pixels, **options)
    content, checked = file.getvalue(), []
    if "deflate" in name or name in ("palette", "signed"):  # each segment ends with its Adler-32
        with tifffile.TiffFile(BytesIO(content)) as tif:
            page = tif.pages.first
            sizes = zip(page.dataoffsets, page.databytecounts, strict=True)
            checked = [(offset, offset + size) for offset, size in sizes]
    return Seed(name, content, 700, tuple(checked))


# PNG and JPEG


def pngs(rng: np.random.Generator) -> list[Seed]:
    grey, colour, alpha = (smooth(rng, (40, 30, n), "u1") for n in (1, 3, 4))
    deep, deep_colour = smooth(rng, (40, 30), "u2") * 200, smooth(rng, (40, 30, 3), "u2") * 200
    notes = PngInfo()
    notes.add_text("note", "x" * 200, zip=True)
    indexed = Image.fromarray(colour).quantize(17)
    contents = {
        "grey": pillow(Image.fromarray(grey[..., 0]), "PNG", dpi=(300, 300), pnginfo=notes),
        "rgb": pillow(Image.fromarray(colour), "PNG", icc_profile=bytes(200)),
        "rgba": pillow(Image.fromarray(alpha), "PNG"),
        "palette": pillow(indexed, "PNG", transparency=3),
        "palette_4_bits": pillow(Image.fromarray(colour).quantize(9), "PNG", bits=4),
        "1_bit": pillow(Image.fromarray(grey[..., 0] > 100), "PNG"),
        "grey_16": imagecodecs.png_encode(deep),
        "rgb_16": imagecodecs.png_encode(deep_colour),
    }
    contents["several_idat"] = split_idat(contents["rgb"])
    contents["several_idat_16"] = split_idat(contents["rgb_16"])
    contents["interlaced"] = interlaced(grey[..., 0])
    return [Seed(name, content, 120, whole(content)) for name, content in contents.items()]


def pillow(image: Image.Image, kind: str, **options: object) -> bytes:
    file = BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def png_chunks(content: bytes) -> list[tuple[bytes, bytes]]:
    """(type, data) of every chunk."""
    chunks, at = [], 8
    while at + 12 <= len(content):
        (length,) = struct.unpack(">I", content[at : at + 4])
        chunks.append((content[at + 4 : at + 8], content[at + 8 : at + 8 + length]))
        at += 12 + length
    return chunks


def join_png(chunks: list[tuple[bytes, bytes]]) -> bytes:
    """With the right checksums."""
    parts = (struct.pack(">I", len(d)) + kind + d + struct.pack(">I", zlib.crc32(kind + d)) for kind, d in chunks)
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def split_idat(content: bytes) -> bytes:
    out = []
    for kind, data in png_chunks(content):
        cuts = range(0, len(data), 500) if kind == b"IDAT" else [0]
        out += [(kind, data[cut : cut + 500] if kind == b"IDAT" else data) for cut in cuts]
    return join_png(out)


def interlaced(grey: np.ndarray) -> bytes:
    """Adam7, which Pillow reads and does not write."""
    passes = ((0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2), (1, 0, 2, 1))
    rows = b"".join(b"\0" + row.tobytes() for y, x, dy, dx in passes for row in grey[y::dy, x::dx])
    header = struct.pack(">IIBBBBB", grey.shape[1], grey.shape[0], 8, 0, 0, 0, 1)
    return join_png([(b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")])


def jpegs(rng: np.random.Generator) -> list[Seed]:
    colour = Image.fromarray(smooth(rng, (40, 30, 3), "u1"))
    exif = Image.Exif()
    exif[0x0112] = 6
    contents = {
        "grey": pillow(colour.convert("L"), "JPEG"),
        "rgb": pillow(colour, "JPEG", exif=exif, icc_profile=bytes(100)),
        "cmyk": pillow(colour.convert("CMYK"), "JPEG"),
        "progressive": pillow(colour, "JPEG", progressive=True),
        "restart": pillow(colour, "JPEG", restart_marker_blocks=2, dpi=(300, 300)),
        "subsampled": pillow(colour, "JPEG", subsampling="4:2:0", optimize=True),
    }
    return [Seed(name, content, 650) for name, content in contents.items()]


# DICOM and NIfTI


def dicoms(rng: np.random.Generator) -> list[Seed]:
    grey, frames = smooth(rng, (40, 30), "u2"), smooth(rng, (3, 40, 30), "u1")
    colour = smooth(rng, (2, 20, 30, 3), "u1")
    jpeg = encapsulate([pillow(Image.fromarray(frame), "JPEG") for frame in frames])
    jpeg2000 = encapsulate([imagecodecs.jpeg2k_encode(frame, level=0, codecformat="J2K") for frame in frames])
    contents = {
        "native": dicom(grey, RescaleSlope="1", RescaleIntercept="-1024", PixelSpacing=[0.5, 0.4]),
        "implicit": dicom(grey, ImplicitVRLittleEndian, PhotometricInterpretation="MONOCHROME1"),
        "colour": dicom(colour),
        "enhanced": dicom(frames, PerFrameFunctionalGroupsSequence=[rescale(k) for k in range(3)]),
        "jpeg": dicom(frames, JPEGBaseline8Bit, PixelData=jpeg),
        "jpeg2000": dicom(frames, JPEG2000Lossless, PixelData=jpeg2000),
    }
    data, compressed = dcmread(BytesIO(dicom(frames.astype("u2")))), BytesIO()
    data.compress(RLELossless)
    data.save_as(compressed)
    contents["rle"] = compressed.getvalue()
    return [Seed(name, content, 900) for name, content in contents.items()]


def dicom(pixels: np.ndarray, syntax: str = ExplicitVRLittleEndian, **elements: object) -> bytes:
    data, file = Dataset(), BytesIO()
    data.file_meta = FileMetaDataset()
    data.file_meta.TransferSyntaxUID = syntax
    data.SOPClassUID, data.SOPInstanceUID = CTImageStorage, generate_uid(entropy_srcs=["seed"])
    data.SamplesPerPixel = 3 if pixels.ndim == 4 else 1
    data.Rows, data.Columns = pixels.shape[1:3] if pixels.ndim == 4 else pixels.shape[-2:]
    if pixels.ndim > 2:
        data.NumberOfFrames = len(pixels)
    if pixels.ndim == 4:
        data.PlanarConfiguration = 0
    data.PhotometricInterpretation = "RGB" if pixels.ndim == 4 else "MONOCHROME2"
    data.BitsAllocated = data.BitsStored = 8 * pixels.dtype.itemsize
    data.HighBit, data.PixelRepresentation = data.BitsStored - 1, 0
    data.PixelData = pixels.tobytes()
    data["PixelData"].VR = "OW" if pixels.dtype.itemsize > 1 else "OB"
    for keyword, value in elements.items():
        setattr(data, keyword, value)
    data.save_as(file, enforce_file_format=True)
    return file.getvalue()


def rescale(intercept: int) -> Dataset:
    values, group = Dataset(), Dataset()
    values.RescaleSlope, values.RescaleIntercept = "1", str(intercept)
    group.PixelValueTransformationSequence = [values]
    return group


def niftis(rng: np.random.Generator) -> list[Seed]:
    volume = smooth(rng, (12, 10, 5), "i2")
    big = nibabel.Nifti1Image(volume.astype(">i2"), np.eye(4), nibabel.Nifti1Header(endianness=">"))
    scaled = nibabel.Nifti1Image(volume.astype("f8"), np.eye(4), dtype=np.int16)
    contents = {
        "nii": nibabel.Nifti1Image(volume, np.eye(4)).to_bytes(),
        "nifti2": nibabel.Nifti2Image(volume, np.eye(4)).to_bytes(),
        "big_endian": big.to_bytes(),
        "scaled": scaled.to_bytes(),
        "channels": nibabel.Nifti1Image(smooth(rng, (12, 10, 5, 2), "f4"), np.eye(4)).to_bytes(),
    }
    plain = [Seed(name, content, 400) for name, content in contents.items()]
    zipped = [(name, gzip.compress(contents[name], mtime=0)) for name in ("nii", "nifti2", "channels")]
    return plain + [Seed(f"{name}.gz", content, 200, whole(content)) for name, content in zipped]


# Arrays


def fits_files(rng: np.random.Generator) -> list[Seed]:
    cube, plane = smooth(rng, (3, 10, 12), "f4"), smooth(rng, (40, 30), "i2")
    table = fits.BinTableHDU.from_columns([fits.Column("angle", "D", array=np.arange(9.0))])
    text = fits.TableHDU.from_columns([fits.Column("angle", "E15.7", array=np.arange(9.0))])
    scaled = fits.PrimaryHDU(plane.copy())
    scaled.scale("int16", bscale=0.5, bzero=3)
    lists: dict[str, tuple[list, tuple[int, ...], bool]] = {
        "cube": ([fits.PrimaryHDU(cube)], (3,), False),
        "cube_checked": ([fits.PrimaryHDU(cube)], (3,), True),
        "scaled": ([scaled], (2,), False),
        "second": ([fits.PrimaryHDU(plane), fits.ImageHDU(cube)], (3,), False),
        "second_checked": ([fits.PrimaryHDU(), fits.ImageHDU(plane)], (2,), True),
        "table": ([fits.PrimaryHDU(), table], (1,), False),
        "table_checked": ([fits.PrimaryHDU(), table], (1,), True),
        "text_table": ([fits.PrimaryHDU(), text], (1,), False),
    }
    for kind in ("RICE_1", "GZIP_2", "PLIO_1"):
        lists[kind] = [fits.PrimaryHDU(), fits.CompImageHDU(plane, compression_type=kind)], (2,), False
    lists["RICE_1_floats"] = [fits.PrimaryHDU(), fits.CompImageHDU(cube[0], compression_type="RICE_1")], (2,), False
    lists["RICE_1_checked"] = [fits.PrimaryHDU(), fits.CompImageHDU(plane, compression_type="RICE_1")], (2,), True
    seeds = []
    for name, (hdus, dims, checksum) in lists.items():
        file = BytesIO()
        fits.HDUList(hdus).writeto(file, checksum=checksum)
        content = file.getvalue()
        seeds.append(Seed(name, content, 6000, whole(content) if checksum else (), dims))
        if name == "cube":
            packed = gzip.compress(content, mtime=0)
            seeds.append(Seed("cube.gz", packed, 200, whole(packed), dims))
    return seeds


def npys(rng: np.random.Generator) -> list[Seed]:
    arrays = {
        "float32": smooth(rng, (3, 10, 12), "f4"),
        "fortran": np.asfortranarray(smooth(rng, (3, 10, 12), "i2")),
        "big_endian": smooth(rng, (3, 10, 12), ">f8"),
        "float16": smooth(rng, (3, 10, 12), "f2"),
    }
    seeds = []
    for name, array in arrays.items():
        for version in ((1, 0), (2, 0)):
            file = BytesIO()
            np.lib.format.write_array(file, array, version=version)
            seeds.append(Seed(f"{name}_v{version[0]}", file.getvalue(), 128, (), (3,)))
    return seeds


def texts(rng: np.random.Generator) -> list[Seed]:
    numbers = smooth(rng, (30, 1), "f8")
    lines = "\n".join(f"{value[0]:.6g}" for value in numbers)
    table = "\n".join(", ".join(f"{v:.3f}" for v in row) for row in smooth(rng, (10, 8), "f8"))
    contents = {
        "column": lines.encode(),
        "comments": f"# angles in degrees\n{lines}\n".encode(),
        "windows": b"\xef\xbb\xbf" + lines.replace("\n", "\r\n").encode(),
    }
    seeds = [Seed(name, content, 60, (), (1,)) for name, content in contents.items()]
    packed = gzip.compress(lines.encode(), mtime=0)
    return [*seeds, Seed("table", table.encode(), 60, (), (2,)), Seed("column.gz", packed, 60, whole(packed), (1,))]

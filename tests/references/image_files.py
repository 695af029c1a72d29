"""Image files of every format, by the libraries of those formats, with the pixels to be read from them."""

from pathlib import Path

import nibabel
import numpy as np
import tifffile
from PIL import Image
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid


def noise(shape: tuple[int, ...], dtype: type = np.uint16, seed: int = 0) -> np.ndarray:
    """Values over the whole range of an integer type, or around zero."""
    rng = np.random.default_rng(seed)
    if np.dtype(dtype).kind == "f":
        return rng.standard_normal(shape).astype(dtype)
    limits = np.iinfo(dtype)
    return rng.integers(limits.min, limits.max, shape, dtype, endpoint=True)


def write_dicom(path: Path, pixels: np.ndarray, syntax: str = ExplicitVRLittleEndian, **elements) -> None:
    """Frames (T, H, W[, C]) or one image (H, W), uncompressed or already encoded, with further elements."""
    data = Dataset()
    data.file_meta = FileMetaDataset()
    data.file_meta.TransferSyntaxUID = syntax
    data.SOPClassUID, data.SOPInstanceUID = CTImageStorage, generate_uid()
    if pixels.ndim > 2:
        data.NumberOfFrames = len(pixels)
    data.Rows, data.Columns = pixels.shape[-2:] if pixels.ndim < 4 else pixels.shape[1:3]
    data.SamplesPerPixel = 1 if pixels.ndim < 4 else pixels.shape[-1]
    data.PhotometricInterpretation = "MONOCHROME2" if data.SamplesPerPixel == 1 else "RGB"
    data.BitsAllocated = data.BitsStored = pixels.dtype.itemsize * 8
    data.PixelRepresentation = int(pixels.dtype.kind == "i")
    if data.SamplesPerPixel > 1:
        data.PlanarConfiguration = 0
    data.PixelData = pixels.tobytes()
    data["PixelData"].VR = "OW" if pixels.dtype.itemsize > 1 else "OB"
    for keyword, value in elements.items():
        setattr(data, keyword, value)
    data.HighBit = data.BitsStored - 1
    data.save_as(path, enforce_file_format=True)


def write_all(folder: Path) -> dict[str, tuple[Path, np.ndarray]]:
    """{name: (file, pixels (pages, H, W, C))}: every way of storing an image of 50 x 70 pixels."""
    stack, colour, grey = noise((3, 50, 70)), noise((50, 70, 3), np.uint8), noise((50, 70))
    tiffs = {
        "plain": (stack, {}),
        "big_endian": (stack, {"byteorder": ">"}),
        "bigtiff": (stack, {"bigtiff": True}),
        "deflate_strips": (stack, {"compression": "zlib", "rowsperstrip": 8}),
        "lzw_tiles": (stack, {"compression": "lzw", "predictor": True, "tile": (16, 32)}),
        "plain_tiles": (stack, {"tile": (32, 16)}),
        "zstd_big_endian": (stack, {"compression": "zstd", "byteorder": ">", "tile": (16, 16)}),
        "packbits": (colour, {"compression": "packbits", "photometric": "rgb", "rowsperstrip": 7}),
        "lzma": (stack, {"compression": "lzma"}),
    }
    files = {}
    for name, (pixels, options) in tiffs.items():
        path = folder / f"{name}.tif"
        tifffile.imwrite(path, pixels, **({"photometric": "minisblack"} | options))
        files[name] = path, pixels.reshape(-1, 50, 70, pixels.shape[-1] if pixels is colour else 1)
    for name, image in {"png16": grey, "png_rgb": colour, "jpeg": colour}.items():
        path = folder / f"{name}.{'jpg' if name == 'jpeg' else 'png'}"
        Image.fromarray(image).save(path)
        with Image.open(path) as written:  # JPEG loses a little
            files[name] = path, np.asarray(written).reshape(1, 50, 70, -1)
    write_dicom(folder / "dicom.dcm", stack)
    files["dicom"] = folder / "dicom.dcm", stack[..., None]
    for suffix in (".nii", ".nii.gz"):
        path = folder / f"volume{suffix}"
        nibabel.Nifti1Image(stack.transpose(2, 1, 0), np.eye(4)).to_filename(path)
        files[suffix] = path, stack[..., None]
    return files

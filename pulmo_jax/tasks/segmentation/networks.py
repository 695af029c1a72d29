"""The networks of a run: their classes, folds and preprocessing, in networks.json, which may come from elsewhere."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

from pydantic import Field, TypeAdapter, ValidationError

from pulmo_jax.data.codes import MOST_EXCLUSIVE, MOST_OVERLAPPING, Classes
from pulmo_jax.data.transforms import Preprocessing
from pulmo_jax.host.files import write_json
from pulmo_jax.host.reading import read_bytes
from pulmo_jax.training.members import chunk_sizes
from pulmo_jax.types import InputError

NETWORKS = "networks.json"
FILE_BYTES = 2**26  # largest networks.json
MOST_NETWORKS = 10_000
NETWORKS_PER_PROGRAM = 8  # larger programs take longer to compile than they save
Seed = Annotated[int, Field(ge=0, lt=2**32)]


@dataclass(frozen=True)
class Networks:
    """The M networks of a run, `members` consecutive ones for each fold.

    Attributes:
        classes: Classes of the run.
        members: Networks per fold.
        seeds: Seed of all random numbers of the training of each network.
        preprocessing: Preprocessing of each network, fitted to the training images of its fold.
    """

    classes: Classes
    members: Annotated[int, Field(ge=1, le=MOST_NETWORKS)]
    seeds: Annotated[tuple[Seed, ...], Field(min_length=1, max_length=MOST_NETWORKS)]
    preprocessing: tuple[Preprocessing, ...]

    def __len__(self) -> int:
        return len(self.seeds)

    @property
    def n_folds(self) -> int:
        """Number of folds."""
        return len(self) // self.members

    @property
    def patch_size(self) -> int:
        """Side length of the patches, px."""
        return self.preprocessing[0].patch_size

    @property
    def channels(self) -> int:
        """Number of bands."""
        return self.preprocessing[0].channels

    @property
    def resize(self) -> bool:
        """Whether whole images are resized to a patch."""
        return self.preprocessing[0].resize

    @property
    def chunk_sizes(self) -> list[int]:
        """Numbers of networks in the jointly trained chunks."""
        return chunk_sizes(len(self), NETWORKS_PER_PROGRAM)

    def fold_of(self, network: int) -> int:
        """Fold of a network."""
        return network // self.members

    def of_fold(self, fold: int) -> range:
        """Networks of a fold."""
        return range(fold * self.members, (fold + 1) * self.members)


def write_networks(folder: Path, networks: Networks) -> None:
    """Write networks.json to a run directory."""
    write_json(folder / NETWORKS, asdict(networks))


def read_networks(folder: Path) -> Networks:
    """Read networks.json.

    Args:
        folder: Run directory.

    Returns:
        The networks.

    Raises:
        InputError: If the file cannot be read, or its values do not fit together.
    """
    path = folder / NETWORKS
    try:
        found = TypeAdapter(Networks).validate_json(read_bytes(path, FILE_BYTES, folder))
    except (OSError, ValidationError, InputError) as error:
        raise InputError(f"{path}: does not describe the networks of a segmentation; train again") from error
    if not (is_valid(found.classes) and len(found) % found.members == 0 and fit_together(found)):
        raise InputError(f"{path}: its classes, networks and preprocessing do not fit together; train again")
    return found


def is_valid(classes: Classes) -> bool:
    """Whether there are names and distinct numbers for as many classes as a code can hold."""
    most = MOST_OVERLAPPING if classes.overlapping else MOST_EXCLUSIVE
    numbers = classes.numbers
    return (
        1 <= len(classes.names) <= most
        and len(set(classes.names)) == len(classes.names) == len(numbers) == len(set(numbers))
        and all(1 <= number <= MOST_EXCLUSIVE for number in numbers)
    )


def fit_together(networks: Networks) -> bool:
    """Whether the preprocessings are valid, one for each network, and agree in what a network sees."""
    hows: Sequence[Preprocessing] = networks.preprocessing
    kinds = {(how.patch_size, how.channels, how.resize, how.dtype, how.percentiles) for how in hows}
    return len(hows) == len(networks) and len(kinds) == 1 and all(how.is_consistent for how in hows)

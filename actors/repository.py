"""The model artifacts that an executor may serve: some that it was told of, and those in a folder.

Requests name models, never paths. What is in the folder by way of a link that leads out of it is not served.
"""

import hashlib
import logging
from collections.abc import Callable, Collection, Iterable, Iterator
from pathlib import Path

from msgspec import Struct

from narsil_stream.actors.score_memory import ScoreMemory
from narsil_stream.core.versions import newness
from narsil_stream.kernels.artifact import MODEL, WEIGHTS, ArtifactError, read_spec
from narsil_stream.kernels.backend import PROTOCOL, Backend, Unfit, speaks
from narsil_stream.schemas.internal import ModelCard, ModelRef
from narsil_stream.schemas.model import NAME, ModelSpec

log = logging.getLogger(__name__)

ALL = "*"

Loader = Callable[[Path], Backend]
Name = tuple[str, str]
"""A model's name and version."""


class Missing(ArtifactError):
    """There is no such model."""


class Found(Struct, frozen=True):
    folder: Path
    spec: ModelSpec

    @property
    def name(self) -> Name:
        return self.spec.name, self.spec.version


class Loaded(Struct, frozen=True):
    """A model that is ready to compute."""

    ref: ModelRef
    card: ModelCard
    backend: Backend
    scores: ScoreMemory

    def __str__(self) -> str:
        """For logs."""
        ref, card, most = self.ref, self.card, self.backend.capabilities.max_rows
        at_once = "1 batch at a time" if card.lanes == 1 else f"{card.lanes} batches at once"
        rows = f" of {most:,} rows" if most else ""
        return f"{ref.name} version {ref.version} on {card.device} ({card.backend}, {card.precision}), {at_once}{rows}"


class Listing(Struct, frozen=True):
    """What there is. An artifact whose `model.json` cannot be read goes by the names of its folders."""

    found: dict[Name, Found]
    damaged: dict[Name, ArtifactError]

    def versions(self, model: str) -> list[Found]:
        """The newest last."""
        return sorted((f for f in self.found.values() if f.spec.name == model), key=lambda f: newness(f.spec.version))

    def newest(self) -> list[Found]:
        """Of each model the newest version."""
        return [self.versions(model)[-1] for model in sorted({name for name, _ in self.found})]


def digest(artifact: Path) -> str:
    """Raises OSError."""
    return hashlib.sha256((artifact / MODEL).read_bytes()).hexdigest()[:16]


class Repository:
    """Methods read files: not for an event loop. `models`: artifacts wherever they are; `folder`: what holds more."""

    def __init__(self, models: Iterable[Path] = (), folder: Path | None = None) -> None:
        self._models = tuple(models)
        self._folder = folder

    def look(self) -> Listing:
        """Everything, as it is now. Raises ArtifactError when the folder itself cannot be read."""
        listing = Listing({}, {})
        for artifact in self._models:
            _add(listing, artifact, (artifact.name, ""), None)
        if self._folder is not None:
            for artifact, name in _artifacts(self._folder):
                _add(listing, artifact, name, self._folder)
        return listing

    def find(self, model: str, version: str = "") -> Found:
        """The newest version unless one is named. Raises ArtifactError for a damaged one, Missing for none."""
        listing = self.look()
        versions = [found for found in listing.versions(model) if version in ("", found.spec.version)]
        for (name, of), error in listing.damaged.items():
            newer = not versions or not of or newness(of) >= newness(versions[-1].spec.version)
            if name == model and version in ("", of) and newer:
                raise error
        if versions:
            return versions[-1]
        holds = ", ".join(f"{name} version {of}" for name, of in sorted(listing.found)) or "nothing"
        wanted = f"model '{model}'" + (f" version '{version}'" if version else "")
        raise Missing("the model repository", f"no {wanted}", f"one of what it holds ({holds})", "name one of these")

    def at_start(self, names: Collection[str] | None) -> tuple[list[Found], list[Found]]:
        """What has to be loaded, and what is loaded if it can be. None or "*" among `names`: all.

        Raises ArtifactError when something that has to be loaded is damaged or not there.
        """
        told = [Found(artifact, read_spec(artifact)) for artifact in self._models]
        named = [self.find(name) for name in names or () if name != ALL]
        must = {found.name: found for found in (*told, *named)}
        listing = self.look()
        for found in must.values():
            if found.name in listing.damaged:
                raise listing.damaged[found.name]
        rest = listing.newest() if names is None or ALL in names else []
        for (name, version), error in listing.damaged.items():
            log.error("model %s %s is not served: %s", name, version, error)
        return list(must.values()), [found for found in rest if found.name not in must]

    def plain(self, error: Exception) -> str:
        """For callers, who need not know where on this machine the files are."""
        text = error.told if isinstance(error, Unfit) else str(error)
        for folder in (self._folder, *(artifact.parent for artifact in self._models)):
            if folder is not None:
                text = text.replace(f"{folder}/", "")
        return text


def load(found: Found, loader: Loader, max_rows: int) -> Loaded:
    """Read, check and warm up for batches of up to `max_rows` rows. Raises ArtifactError, Unfit."""
    of = _digest(found.folder)
    backend = loader(found.folder)
    try:
        spec, info = backend.spec, backend.info
        if not speaks(version := backend.capabilities.protocol):
            here = f"the {info.name} backend speaks version {version} of the protocol, this executor {PROTOCOL}"
            raise Unfit(f"{here}. Next: install versions that belong together")
        if _digest(found.folder) != of or (spec.name, spec.version) != found.name:
            raise _changed(found.folder)
        backend.warm_up(max_rows)
    except BaseException:
        backend.unload()
        raise
    card = ModelCard(of, spec, info.name, info.device, info.precision, info.lanes, backend.capabilities)
    return Loaded(ModelRef(spec.name, spec.version, of), card, backend, ScoreMemory(backend.empty, max_rows))


def _digest(artifact: Path) -> str:
    try:
        return digest(artifact)
    except OSError:
        raise _changed(artifact) from None


def _changed(artifact: Path) -> ArtifactError:
    return ArtifactError(str(artifact), "other files than at the start", "an artifact at rest", "load it again")


def _artifacts(root: Path) -> Iterator[tuple[Path, Name]]:
    """<folder>/model.json and <model>/<version>/model.json, with the names that their folders suggest."""
    for folder in _subfolders(root):
        if (folder / MODEL).exists():
            yield folder, (folder.name, "")
        else:
            yield from ((sub, (folder.name, sub.name)) for sub in _subfolders(folder) if (sub / MODEL).exists())


def _subfolders(folder: Path) -> list[Path]:
    """Hidden ones are passed over: artifacts are written under such names before they get their own."""
    try:
        return sorted(path for path in folder.iterdir() if not path.name.startswith(".") and path.is_dir())
    except OSError as error:
        raise ArtifactError(
            str(folder), error.strerror or str(error), "a folder that can be read", "check it"
        ) from None


def _add(listing: Listing, artifact: Path, name: Name, root: Path | None) -> None:
    """Enter it as found, or as damaged."""
    try:
        if root is not None:
            _check_inside(artifact, root)
        found = Found(artifact, read_spec(artifact))
    except ArtifactError as error:
        if all(NAME.fullmatch(part) for part in name if part):
            listing.damaged[name] = error
        else:
            log.warning("an artifact that nobody can name is passed over: %s", error)
        return
    same = listing.found.get(found.name)
    if same is None and found.name not in listing.damaged:
        listing.found[found.name] = found
    elif same is not None and not same.folder.samefile(artifact):
        del listing.found[found.name]
        where = f"{same.folder} and {artifact}"
        listing.damaged[found.name] = ArtifactError(
            where, f"model '{found.spec.name}' version {found.spec.version} twice", "it once", "remove one of them"
        )


def _check_inside(artifact: Path, root: Path) -> None:
    inside = root.resolve()
    for path in (artifact, artifact / MODEL, artifact / WEIGHTS):
        if not path.resolve().is_relative_to(inside):
            raise ArtifactError(
                str(path), "a link that leads out of the repository", "files inside it", "put the files there"
            )

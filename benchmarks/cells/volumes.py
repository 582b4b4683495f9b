"""Volumes: cost of reading and resampling, with and without the cache."""

from __future__ import annotations

import tempfile
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from benchmarks.harness import Cell, GateError, Ratio
from medm.data.volume_cache import MediaCache
from medm.imaging import load_pixels
from medm.imaging.options import VolumePreprocess

_ROOT = Path(__file__).parents[2]
SHIPPED = [
    _ROOT / "examples" / "quickstart" / "data" / f"chest-ct-{number}.nii.gz" for number in (1, 2, 3)
]
"""Real chest CT, coarser than it was taken so that it can be shipped: voxels of 1.5 to 2 mm."""
FETCHED = [_ROOT / ".assets" / "pyradiomics" / f"lung{number}_image.nrrd" for number in (1, 2)]
"""Real chest CT as it was taken, 512 x 512 per slice: `python examples/quickstart/fetch.py
sources`."""


class _VolumeCell(Cell):
    shape: ClassVar[tuple[int, int, int]] = (128, 512, 512)
    count: ClassVar[int] = 2

    @cached_property
    def folder(self) -> Any:
        """Drawn volumes of the size of a full chest CT, in HU as int16; an `.npy` costs both sides
        the same to read.
        """
        folder = tempfile.TemporaryDirectory()
        rng = np.random.default_rng(0)
        for number in range(self.count):
            voxels = rng.normal(-300, 400, self.shape).clip(-1024, 3000).astype(np.int16)
            np.save(Path(folder.name) / f"{number}.npy", voxels)
        return folder

    @property
    def files(self) -> list[Path]:
        """Files to read."""
        return sorted(Path(self.folder.name).glob("*.npy"))

    @cached_property
    def preprocess(self) -> VolumePreprocess:
        """One window, stretched to 32 x 256 x 256, in the order of the file."""
        return VolumePreprocess(windows=[[-1000.0, 1000.0]], size=[32, 256, 256], orientation=None)

    @cached_property
    def chain(self) -> Any:
        """The same in MONAI, in its usual order."""
        from monai.transforms import Compose, Resize, ScaleIntensityRange

        return Compose(
            [
                ScaleIntensityRange(a_min=-1000, a_max=1000, b_min=0, b_max=1, clip=True),
                Resize((32, 256, 256), mode="trilinear"),
            ]
        )

    def monai(self, file: Path) -> np.ndarray:
        """(1, 32, 256, 256)."""
        return np.asarray(self.chain(self.read(file)[None]))

    def read(self, file: Path) -> np.ndarray:
        """(D, H, W), as the other side reads it."""
        return np.load(file)

    def ours(self, file: Path) -> np.ndarray:
        """(1, 32, 256, 256)."""
        return load_pixels(
            file, self.preprocess, device="cuda" if self.profile == "h200" else "cpu"
        )

    def gate(self) -> str:
        """Equal output."""
        difference = float(np.abs(self.ours(self.files[0]) - self.monai(self.files[0])).max())
        if difference > 1e-3:
            raise GateError(f"largest difference {difference:.2e}")
        return f"largest difference {difference:.1e}"

    @property
    def setting(self) -> dict[str, Any]:
        volume = f"{'x'.join(map(str, self.shape))}, drawn, .npy"
        return {"volume": volume, "result": "32x256x256", "volumes": self.count}

    def run_peer(self) -> float:
        """MONAI at every access."""
        return sum(self.monai(file).shape[0] for file in self.files)


class _RealCT(_VolumeCell):
    """Real chest CT in packed files: those that were fetched, or the coarser ones that are
    shipped.
    """

    @cached_property
    def folder(self) -> Any:
        """Folder of the cache."""
        return tempfile.TemporaryDirectory()

    @property
    def files(self) -> list[Path]:
        """Files that are present."""
        return FETCHED if all(file.exists() for file in FETCHED) else SHIPPED

    def read(self, file: Path) -> np.ndarray:
        """By SimpleITK, which MONAI's own reader of such files calls too."""
        import SimpleITK  # is not on every machine that measures the other cells

        return SimpleITK.GetArrayFromImage(SimpleITK.ReadImage(str(file)))

    @property
    def setting(self) -> dict[str, Any]:
        sizes = ", ".join("x".join(map(str, self.read(file).shape)) for file in self.files)
        names = ", ".join(file.name for file in self.files)
        return {
            "volume": f"{sizes}, real CT ({names})",
            "result": "32x256x256",
            "volumes": len(self.files),
        }


class FirstReading(_VolumeCell, Ratio):
    """P5."""

    name, title, peer = "P5", "first preprocessing of a volume", "MONAI chain"
    targets: ClassVar = {"cpu": 2.0, "h200": 20.0}

    def run_ours(self) -> float:
        return sum(self.ours(file).shape[0] for file in self.files)


class CachedReading(_VolumeCell, Ratio):
    """P4: memory-mapped entries, read to the last byte."""

    name, title, peer = "P4", "cached volume reads", "MONAI chain at every access"
    targets: ClassVar = {"cpu": 150.0, "h200": 150.0}
    passes: ClassVar[int] = 50

    @cached_property
    def preprocess(self) -> VolumePreprocess:
        """As MedM-VL's chain: cropped to the foreground before it is stretched."""
        return VolumePreprocess(
            windows=[[-1000.0, 1000.0]], size=[32, 256, 256], orientation=None, crop_foreground=0.0
        )

    @cached_property
    def chain(self) -> Any:
        """The same in MONAI."""
        from monai.transforms import Compose, CropForeground

        window, resize = super().chain.transforms
        return Compose([window, CropForeground(), resize])

    @cached_property
    def cache(self) -> MediaCache:
        """The cache, filled on first access."""
        return MediaCache(Path(self.folder.name) / "cache", max_bytes=2**30)

    def ours(self, file: Path) -> np.ndarray:
        return np.array(self.cache.load(file, self.preprocess))

    def run_ours(self) -> float:
        return sum(self.ours(file).shape[0] for _ in range(self.passes) for file in self.files)


class FirstReadingOfCT(_RealCT, FirstReading):
    """P5 on real files, which both sides unpack first."""

    name, title = "P5-CT", "first preprocessing of a real CT"


class CachedReadingOfCT(_RealCT, CachedReading):
    """P4 on real files."""

    name, title = "P4-CT", "cached reads of a real CT"

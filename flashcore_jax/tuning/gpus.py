"""Which GPU a call traced now will run on, and its limits."""

import dataclasses
import re

import jax


@dataclasses.dataclass(frozen=True)
class Gpu:
    """What the choice of a tile depends on."""

    kind: str
    capability: tuple[int, int]
    shared_memory: int  # bytes that one block may use
    multiprocessors: int

    @property
    def has_wgmma(self) -> bool:
        return self.capability[0] == 9


_SHARED_MEMORY = {
    (8, 0): 166912,
    (8, 6): 101376,
    (8, 7): 166912,
    (8, 9): 101376,
    (9, 0): 232448,
    (10, 0): 232448,
    (10, 3): 232448,
    (12, 0): 101376,
}
# Compute capability, multiprocessors. From the vendor's tables.
_KINDS = {
    "NVIDIA A100": ((8, 0), 108), "NVIDIA A30": ((8, 0), 56), "NVIDIA A10": ((8, 6), 72), "NVIDIA L4": ((8, 9), 58),
    "NVIDIA L40": ((8, 9), 142), "NVIDIA H100": ((9, 0), 132), "NVIDIA H200": ((9, 0), 132), "NVIDIA GH200": ((9, 0), 132),
    "NVIDIA B200": ((10, 0), 148), "NVIDIA GB200": ((10, 0), 148), "NVIDIA B300": ((10, 3), 148), "NVIDIA GB300": ((10, 3), 148),
}  # fmt: skip


def gpu_of(kind: str, capability: str | None = None) -> Gpu:
    """The GPU of a device kind such as "NVIDIA H200" or "NVIDIA A100-SXM4-80GB"; capability such as "9.0" where known."""
    known = next((k for k in _KINDS if re.match(rf"{k}\b", kind)), None)  # an A10G is no A10
    listed, multiprocessors = _KINDS.get(known, ((0, 0), 64))
    if capability is not None:
        major, minor = map(int, str(capability).split("."))
    else:
        major, minor = listed
    # An unlisted GPU gets the smallest limit of any that the kernels run on.
    return Gpu(known or kind, (major, minor), _SHARED_MEMORY.get((major, minor), 101376), multiprocessors)


def listed_kind(gpu: Gpu) -> str | None:
    """Its own kind where that is listed here, and so by JAX; else one of the same compute capability, whose code it runs."""
    return gpu.kind if gpu.kind in _KINDS else next((kind for kind, (listed, _) in _KINDS.items() if listed == gpu.capability), None)


def target_gpu() -> Gpu | None:
    """The NVIDIA GPU that a call traced now will run on: the abstract mesh's device, else the default device; else None."""
    device = jax.config.jax_default_device
    if device is None or isinstance(device, str):
        device = jax.local_devices(backend=device)[0]
    is_gpu, kind = device.platform in ("gpu", "cuda"), device.device_kind
    capability = getattr(device, "compute_capability", None)
    abstract = getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None)
    if abstract is not None and abstract.device_kind != kind:  # that of a mesh of this machine's says less of itself
        is_gpu, kind, capability = True, abstract.device_kind, None
    return gpu_of(kind, capability) if is_gpu and kind.startswith(("NVIDIA", "Tesla")) else None

"""Engines and model libraries, judged by what fresh processes found of them."""

from collections.abc import Mapping

from lamina.doctor.diagnosis import Check
from lamina.doctor.packages import Needs
from lamina.doctor.probes import EngineProbe
from lamina.names import ENGINES, EngineName

LIBRARIES = ("torchvision", "timm", "transformers")


def check_engines(probes: Mapping[EngineName, EngineProbe], needs: Needs | None) -> list[Check]:
    """One check for each engine, and one that there is an engine at all, which a device needs."""
    checks = [_check_engine(name, probes[name], needs) for name in ENGINES if name in probes]
    if not any(check.state in ("ok", "warning") for check in checks):
        checks.append(
            Check(
                name="an engine",
                state="fault",
                found="none of this machine loads, so it cannot train",
                remedy="lamina engine add executorch (or onnxruntime)",
                roles=("device",),
            )
        )
    return checks


def _check_engine(name: EngineName, probe: EngineProbe, needs: Needs | None) -> Check:
    label = f"engine {name}"
    if probe.folder is None:
        return Check(name=label, state="absent", found="not installed", remedy=probe.how_to_add)
    where = f"{probe.version}, {probe.folder}" if probe.folder else ""
    if probe.fault is not None:
        found = f"does not load: {probe.fault}" + (f" ({where})" if where else "")
        return Check(name=label, state="fault", found=found, remedy=_again(name, probe), roles=("device",))
    if probe.shim is not None and probe.shim.fault is not None:
        compiler = probe.shim.compiler
        if compiler is None:
            return Check(
                name=label,
                state="fault",
                found=f"{where}; no shim for this version ({probe.shim.fault}), and no C++ compiler to build it",
                remedy="install a compiler (Debian: apt install g++) or set $CXX, then: lamina engine list",
                roles=("device",),
            )
        return Check(
            name=label,
            state="warning",
            found=f"{where}; its shim is not built yet ({probe.shim.fault}); the first use builds it with {' '.join(compiler)}",
            remedy="lamina engine list",
        )
    pin = needs.pin("onnxruntime-training-cpu" if name == "onnxruntime" else name) if needs else None
    if pin and probe.version and not pin.is_met_by(probe.version):
        remedy = f"pip install --no-deps '{pin.text}'"
        return Check(name=label, state="warning", found=f"{where}; loads, but lamina is tested with {pin.text}", remedy=remedy)
    shim = f"; shim {probe.shim.path}" if probe.shim else ""
    return Check(name=label, state="ok", found=f"{where}; loads{shim}")


def _again(name: EngineName, probe: EngineProbe) -> str:
    """How to put an engine here anew that does not load."""
    if name == "executorch":
        return "lamina engine add executorch"
    if name == "onnxruntime":
        return "pip uninstall -y onnxruntime onnxruntime-training-cpu && lamina engine add onnxruntime"
    return f"pip install --force-reinstall --no-deps torch=={probe.version}" if probe.version else "pip install 'lamina[torch]'"


def check_libraries(faults: Mapping[str, str | None], versions: Mapping[str, str]) -> list[Check]:
    """Those model libraries that are installed. Without them lamina's own models still export, so none of them is a fault."""
    checks = []
    for name, fault in faults.items():
        if fault is None:
            checks.append(Check(name=name, state="ok", found=f"{versions.get(name, '')}, can be imported"))
            continue
        is_vision = "torchvision" in fault or name == "torchvision"
        remedy = _vision_remedy(versions) if is_vision else f"pip install --force-reinstall --no-deps {name}"
        checks.append(Check(name=name, state="warning", found=f"cannot be imported: {fault}", remedy=remedy))
    return checks


def _vision_remedy(versions: Mapping[str, str]) -> str:
    """A torchvision whose native library is missing or made for CUDA: the build must be that of torch."""
    version = versions.get("torchvision", "").partition("+")[0]
    build = versions.get("torch", "").partition("+")[2]
    if not version or not build:
        return "pip uninstall -y torchvision, or install the one that is made for this torch (docs/doctor.md, torchvision)"
    return (
        f'pip install --no-deps --force-reinstall --index-url "$TORCH_INDEX" torchvision=={version}+{build}, where TORCH_INDEX '
        "is the index that this torch came from  (without timm: pip uninstall -y torchvision; without such an index: "
        "docs/doctor.md, torchvision)"
    )

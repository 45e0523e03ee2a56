"""The devices of a run as a table no wider than 80 columns, and who is missing in words."""

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from lamina.printable import printable
from lamina.wire import DeviceList, DeviceState

CLOSE = (0, 1, 0, 0)
"""One space to the right of a cell and none to its left."""
_MOST_CHARACTERS = 1000
_MOST_NAMES = 8
_WHAT = {"check_in": "check-in", "update": "update", "evaluation": "evaluation", "calibration": "calibration"}


def devices_of(devices: DeviceList) -> Table:
    """A row for each device that the coordinator lists; a last one says how many it leaves out."""
    table = Table(box=SIMPLE_HEAD, padding=CLOSE, pad_edge=False)
    table.add_column("device", overflow="fold")
    table.add_column("asked for\nwork", overflow="fold")
    table.add_column("missing\nis its", overflow="fold")
    table.add_column("did last", overflow="fold", ratio=1)
    table.add_column("when", overflow="fold")
    for device in devices.devices:
        awaited = _WHAT.get(device.awaited, "")
        did = device.did.removesuffix(f" of {devices.run}")
        table.add_row(shown(device.device), seen(device), awaited, shown(did or "-"), ago(device.did_seconds))
        if device.refusal:
            table.add_row("", "", "", shown(f"refused, {device.refusal}"), ago(device.refused_seconds))
    if devices.more:
        table.add_row(f"and {devices.more} more", "", "", "", "")
    return table


def missing_of(devices: DeviceList) -> str:
    """Whom the run waits for and for what: `pi-2 (update), pi-3 (check-in) and 7 more; 1 more device must join`."""
    awaited = [device for device in devices.devices if device.awaited != "none"]
    names = [f"{device.device} ({_WHAT.get(device.awaited, device.awaited)})" for device in awaited[:_MOST_NAMES]]
    told = ", ".join(names)
    if devices.awaited > len(names):
        told += f"{' and ' if names else ''}{devices.awaited - len(names)} more"
    if devices.to_join:
        noun = "device" if devices.to_join == 1 else "devices"
        told += f"{'; ' if told else ''}{devices.to_join} {'more ' if told else ''}{noun} must join"
    return told


def seen(device: DeviceState) -> str:
    return "never" if device.seen_seconds is None else ago(device.seen_seconds)


def ago(seconds: float | None) -> str:
    """`12 s ago`, `3 min ago`, `5 h ago`, `2 d ago`; empty for None."""
    if seconds is None:
        return ""
    for length, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= 2 * length or (seconds >= length and unit != "min"):
            return f"{seconds / length:.0f} {unit} ago"
    return f"{seconds:.0f} s ago"


def shown(text: str) -> Text:
    """Text of another machine as rich shows it: it reads no markup in it."""
    return Text(printable(text, _MOST_CHARACTERS))

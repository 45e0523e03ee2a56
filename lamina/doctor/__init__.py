"""Is this machine ready: what `lamina doctor` looks at, without importing anything heavy into its own process.

report.py         a check, a role, and the report of all of them
requirements.py   what the installed lamina requires, and which packages are here
packages.py       roles and their packages; packages that overwrite each other
probes.py         heavy imports and engines, each in a process of its own, bounded in time
machine.py        Python, compiler, folders, disk, memory, sensors
"""

from lamina.doctor.diagnosis import Check, Report, Role, State

__all__ = ["Check", "Report", "Role", "State"]

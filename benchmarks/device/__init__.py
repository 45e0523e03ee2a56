"""`lamina bench`: what on-device training costs in memory, CPU time and energy, measured on any Linux machine.

cases.py      which cases there are: data, and the records of a prepared folder
prepare.py    programs for the cases, on a machine with torch
case.py       one case in a process of its own, which imports what a device imports
watch.py      that process seen from outside: peaks, energy, how it ended
measure.py    all cases, one after the other, into a result file
compare.py    result files of several machines side by side
"""

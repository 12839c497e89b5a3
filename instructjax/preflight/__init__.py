"""The memory, work and time of a program on a TPU slice, found on a machine without a TPU.

chips.py     peak rates of each type of chip, and the slices that exist
topology.py  a mesh over the devices of a slice, through libtpu
hlo.py       parses the text of an optimised module
loops.py     trip counts of its loops
flops.py     FLOPs of an op
traffic.py   bytes that an op moves
count.py     FLOPs, bytes and collectives of a whole program
program.py   `analyse`: compile, count, estimate
report.py    tables and verdicts
"""

from instructjax.preflight.chips import Topology, parse_topology, slices
from instructjax.preflight.program import Compilable, Program, analyse, lower_bound, shard_bytes
from instructjax.preflight.report import ASSUMPTIONS, tables, verdict
from instructjax.preflight.topology import load_libtpu, make_mesh

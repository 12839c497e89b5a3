"""What a program will need on a TPU slice, from a machine without one.

chips.py     what each type of chip can do at best; the slices that there are
topology.py  a mesh over the devices of a slice, through libtpu
hlo.py       the text of an optimised module, read
loops.py     how often its loops run
flops.py     FLOPs of an op
traffic.py   bytes that an op moves
count.py     all of that over a whole program, with its collectives
program.py   `analyse`: compile, count, estimate
report.py    tables and a verdict
"""

from instructjax.preflight.chips import Topology, parse_topology, slices
from instructjax.preflight.program import Compilable, Memory, Program, analyse, held, shard_bytes
from instructjax.preflight.report import ASSUMPTIONS, tables, verdict
from instructjax.preflight.topology import load_libtpu, make_mesh

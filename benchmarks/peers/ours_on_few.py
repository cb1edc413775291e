"""Run mnist.py on the first few images, for trials.

python benchmarks/peers/ours_on_few.py IMAGES FLAGS…     with the flags of mnist.py
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import mnist

few, load_all = int(sys.argv[1]), mnist.load_mnist
mnist.load_mnist = lambda *args: [(images[:few], labels[:few]) for images, labels in load_all(*args)]
mnist.main(sys.argv[2:])

import os

import torch
from hypothesis import settings

# Tiny tensors: a thread that waits for a busy neighbour costs more than all of them compute. The same for processes that tests start.
torch.set_num_threads(1)
os.environ.setdefault("OMP_NUM_THREADS", "1")
settings.register_profile("suite", deadline=None, derandomize=True, database=None)
settings.load_profile("suite")

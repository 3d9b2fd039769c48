"""Makes the helpers beside this file importable from every test folder; keeps small tensors on one thread.

Several threads that wait for each other make the suite many times slower on a busy machine.
"""

import torch

torch.set_num_threads(1)

"""What only one thread of a process may do on its GPU at a time, whichever family it belongs to.

While one thread captures a CUDA graph, no other may free memory, load machine code or destroy what a library holds:
any of these may wait for the whole device, which a capture does not survive. Nor may two capture at once: libraries
keep one state for that. Running captured graphs needs no lock, so models that score never wait here.
"""

import threading

ON_DEVICE = threading.RLock()
"""Held while a graph is captured, and while memory or machine code comes or goes; not while a computation is waited
for."""

"A shell starts a job in the background with Ctrl-C ignored, and its children inherit that: some tests send one, so listen again."
import signal

signal.signal(signal.SIGINT, signal.default_int_handler)

"A shell starts background jobs with Ctrl-C ignored, and their children inherit that. Some tests send Ctrl-C, so it is restored here."
import signal

signal.signal(signal.SIGINT, signal.default_int_handler)

"""What a run shows of itself to those who watch it: live metrics, the heartbeat file, and where a run folder stands.

Knows files and numbers, nothing of how training works, and imports neither torch nor, before it is needed,
prometheus_client.
"""

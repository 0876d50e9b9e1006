# shellcheck shell=bash
# What torchrun and `accelerate launch` are to do with signals; sourced, not run:
#
#   source launch/signals.sh
#   accelerate launch ... launch/train.py ...
#
# Neither takes it from a configuration file. The job scripts source it as well.

# Those that the launcher passes on to its processes. Of SIGUSR1 it would die, were it not named here.
export PET_SIGNALS_TO_HANDLE="${PET_SIGNALS_TO_HANDLE:-SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1}"
# Seconds that the processes have then to finish a step and to save, before the launcher kills them; by default 30.
# Below the warning time of the job scripts (--signal=TERM@300).
export PET_SHUTDOWN_TIMEOUT="${PET_SHUTDOWN_TIMEOUT:-240}"

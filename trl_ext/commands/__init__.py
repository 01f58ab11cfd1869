"""What the subcommands of `trl-ext` do. `trl_ext.cli` names them and their options.

A file holds those that import the same: whoever asks the doctor does not wait for what trains.
"""

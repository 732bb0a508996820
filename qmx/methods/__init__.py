"""Training methods under one contract, `qmx.contract.Method`: one file each."""

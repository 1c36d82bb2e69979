"""What Lightning lacks: batch arithmetic, rules, checkpoints, callbacks and strategies."""

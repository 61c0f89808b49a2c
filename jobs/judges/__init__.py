"""Job of `trimtab judges`, and judges as the other jobs run them."""

"""Model families: networks, losses, optimizers and generation; one LightningModule a file."""

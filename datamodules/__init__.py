"""Shards to order to samples to resumable batches; one LightningDataModule per kind of data."""

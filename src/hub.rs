//! Hugging Face hub ids → a local folder.

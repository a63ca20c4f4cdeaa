//! The norms of queries and keys.

/// What a norm of q or k goes over.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum QkNorm {
    /// Each head, all with the same gain `[head_dim]`.
    Heads,
    /// All heads together, gain `[heads · head_dim]`.
    Row,
}

impl QkNorm {
    /// Returns the length of the gain for that many heads of `head_dim` values.
    pub fn width(self, heads: usize, head_dim: usize) -> usize {
        match self {
            QkNorm::Heads => head_dim,
            QkNorm::Row => heads * head_dim,
        }
    }
}

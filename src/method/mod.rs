//! Which codes are chosen: rounding methods. They see only effective grids ([`crate::scheme::QTensor::grid`]) and the
//! element table, so each works for every scheme.

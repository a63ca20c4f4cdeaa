//! A backend with all that a whole program asks of it: running, generating, calibrating, and telling what it takes.

use anyhow::Result;

use super::SecondMoments;
use super::cpu::Cpu;
use super::cuda::{Cuda, rates};
use super::footprint::Footprint;
// What a decoder does is the contract of generating; devices implement it.
use crate::generate::Generate;

/// What a machine can do at best, by its own measure.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Ceilings {
    /// Copying, bytes read plus bytes written per second.
    pub copy: f64,
    /// Matrix products, FLOP/s.
    pub products: f64,
}

/// A backend with all that commands ask of one.
pub trait Machine: Generate + SecondMoments + Footprint {
    /// Measures what the machine can do at best; `None` where that is not measured.
    fn ceilings(&self) -> Result<Option<Ceilings>> {
        Ok(None)
    }

    /// Returns what decides the last bit of its results.
    fn arithmetic(&self) -> String {
        self.describe()
    }

    /// Returns the bytes of its own memory that are free; `None` for a device that has no memory of its own.
    fn free_memory(&self) -> Result<Option<u64>> {
        Ok(None)
    }
}

impl Machine for Cpu {
    /// The same on every machine and for every number of threads.
    fn arithmetic(&self) -> String {
        "cpu".to_string()
    }
}

impl Machine for Cuda {
    fn ceilings(&self) -> Result<Option<Ceilings>> {
        let found = Ceilings { copy: rates::copy_bandwidth(self)?, products: rates::matrix_rate(self)? };
        self.device().give_back_memory()?;
        Ok(Some(found))
    }

    fn free_memory(&self) -> Result<Option<u64>> {
        self.device().synchronize()?;
        Ok(Some(self.device().memory()?.0 as u64))
    }
}

//! Residual streams that wait for their next layer, on the device or in the host's memory.
//!
//! Streams are F32 on every device, so what is copied out comes back bit for bit.

use std::borrow::Cow;

use anyhow::Result;

use super::Backend;

/// Where a stream waits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// In the device's own memory.
    Device,
    /// In the host's: copied to the device for each use.
    Host,
}

/// A residual stream `[rows, cols]` between two uses.
pub enum Parked<B: Backend> {
    /// On the device.
    Device(B::Tensor),
    /// In host memory.
    Host {
        /// Width.
        cols: usize,
        /// `[rows, cols]`
        values: Vec<f32>,
    },
}

impl<B: Backend> Parked<B> {
    /// Takes a stream of `cols` columns to its place.
    pub fn new(backend: &B, place: Place, x: B::Tensor, cols: usize) -> Result<Self> {
        Ok(match place {
            Place::Device => Parked::Device(x),
            Place::Host => Parked::Host { cols, values: backend.read(&x)? },
        })
    }

    /// Returns the stream on the device.
    pub fn get(&self, backend: &B) -> Result<Cow<'_, B::Tensor>> {
        Ok(match self {
            Parked::Device(x) => Cow::Borrowed(x),
            Parked::Host { cols, values } => {
                Cow::Owned(backend.tensor(values.len() / (*cols).max(1), *cols, values)?)
            }
        })
    }

    /// Changes the stream on the device.
    pub fn update(&mut self, backend: &B, change: impl FnOnce(&mut B::Tensor) -> Result<()>) -> Result<()> {
        match self {
            Parked::Device(x) => change(x),
            Parked::Host { .. } => {
                let mut x = self.get(backend)?.into_owned();
                change(&mut x)?;
                let Parked::Host { values, .. } = self else { return Ok(()) };
                // Into the same memory: fresh memory costs more than the copy.
                backend.read_into(&x, values)
            }
        }
    }
}

/// Device memory that streams may take, given out as long as it lasts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Room {
    left: Option<u64>,
}

impl Room {
    /// Returns room for `bytes`; `None`: for everything.
    pub fn new(bytes: Option<u64>) -> Self {
        Room { left: bytes }
    }

    /// Takes `bytes` of the room, if there are as many.
    pub fn take(&mut self, bytes: u64) -> bool {
        match &mut self.left {
            None => true,
            Some(left) if *left >= bytes => {
                *left -= bytes;
                true
            }
            Some(_) => false,
        }
    }

    /// Takes room for a stream and returns where it waits.
    pub fn place(&mut self, bytes: u64) -> Place {
        if self.take(bytes) { Place::Device } else { Place::Host }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::cpu::Cpu;

    #[test]
    fn a_stream_is_the_same_wherever_it_waits() {
        let values: Vec<f32> =
            (0..12u32).map(|i| f32::from_bits(i.wrapping_mul(0x9e37_79b9) & 0x7f7f_ffff)).collect();
        let mut found = Vec::new();
        for place in [Place::Device, Place::Host] {
            let x = Cpu.tensor(3, 4, &values).unwrap();
            let mut parked = Parked::<Cpu>::new(&Cpu, place, x, 4).unwrap();
            parked.update(&Cpu, |x| Cpu.add(x, &x.clone())).unwrap();
            found.push(parked.get(&Cpu).unwrap().into_owned());
        }
        assert_eq!(found[0], found[1]);
        assert_eq!(found[0][[1, 2]], 2.0 * values[6]);
    }

    #[test]
    fn a_stream_may_lose_rows_wherever_it_waits() {
        for place in [Place::Device, Place::Host] {
            let x = Cpu.tensor(3, 2, &[1.0, 2.0, 3.0, 4.0, 5.0, 6.0]).unwrap();
            let mut parked = Parked::<Cpu>::new(&Cpu, place, x, 2).unwrap();
            let last = |x: &mut _| {
                *x = Cpu.select_rows(x, &[2])?;
                Ok(())
            };
            parked.update(&Cpu, last).unwrap();
            assert_eq!(Cpu.read(&parked.get(&Cpu).unwrap()).unwrap(), [5.0, 6.0], "{place:?}");
        }
    }

    #[test]
    fn room_is_given_until_it_is_gone() {
        let mut room = Room::new(Some(10));
        assert_eq!([6, 5, 4].map(|bytes| room.place(bytes)), [Place::Device, Place::Host, Place::Device]);
        assert!(!room.take(1) && Room::new(None).take(u64::MAX));
    }
}

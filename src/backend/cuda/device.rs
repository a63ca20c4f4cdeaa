//! One GPU: its context and stream, its memory, and the launching of kernels. Everything runs in order on one stream, so
//! that memory may be freed as soon as its last use is queued.

use std::collections::HashMap;
use std::ffi::c_void;
use std::ptr::null_mut;
use std::sync::{Arc, Mutex, PoisonError};

use anyhow::{Context, Result, bail, ensure};
use cudarc::driver::sys::{
    CUdevice_attribute, CUdeviceptr, CUfunction_attribute, CUlaunchAttribute, CUlaunchAttributeID,
    CUlaunchAttributeValue, CUlaunchConfig, CUmemPool_attribute, cuLaunchKernelEx,
};
use cudarc::driver::{
    CudaContext, CudaFunction, CudaSlice, CudaStream, DevicePtr, DeviceRepr, ValidAsZeroBits, result,
};
use cudarc::nvrtc::Ptx;

use super::compile::{self, Kernel};
use super::library;
use super::signature::{self, Parameter};

/// Bytes on the device; freed in stream order.
pub struct Buffer(CudaSlice<u8>);

impl Buffer {
    /// Returns the address, valid until the buffer is dropped, for work queued before that.
    pub fn at(&self) -> CUdeviceptr {
        self.0.device_ptr(self.0.stream()).0
    }

    /// Returns the size.
    pub fn bytes(&self) -> usize {
        self.0.len()
    }
}

/// A kernel argument.
#[derive(Clone, Copy)]
pub enum Arg<'a> {
    /// An address on the device, or 0.
    Pointer(CUdeviceptr),
    /// `u32`
    U32(u32),
    /// `u64`
    U64(u64),
    /// `float`
    F32(f32),
    /// A struct passed by value, in the device's layout, 8-byte aligned.
    Struct(&'a [u64]),
}

impl Arg<'_> {
    /// Returns the parameter that it is for.
    fn parameter(&self) -> Parameter {
        match self {
            Arg::Pointer(_) => Parameter::Pointer,
            Arg::U32(_) => Parameter::U32,
            Arg::U64(_) => Parameter::U64,
            Arg::F32(_) => Parameter::F32,
            Arg::Struct(_) => Parameter::Struct,
        }
    }
}

/// A kernel on the device.
struct Loaded {
    function: CudaFunction,
    parameters: Vec<Parameter>,
}

/// Threads of a launch.
#[derive(Clone, Copy, Debug)]
pub struct Geometry {
    /// Blocks.
    pub grid: [usize; 3],
    /// Threads of a block.
    pub block: [u32; 2],
    /// Dynamic shared memory of a block, bytes.
    pub shared: u32,
}

impl Geometry {
    /// Returns `blocks` blocks of `threads` threads in a row.
    pub fn flat(blocks: usize, threads: u32) -> Self {
        Geometry { grid: [blocks, 1, 1], block: [threads, 1], shared: 0 }
    }
}

/// A GPU ready for work.
pub struct Device {
    context: Arc<CudaContext>,
    stream: Arc<CudaStream>,
    architecture: String,
    /// Whether launches can overlap their predecessor's end.
    can_overlap: bool,
    /// Most bytes a block can have.
    shared_memory: u32,
    multiprocessors: usize,
    functions: Mutex<HashMap<Kernel, Arc<Loaded>>>,
    staging: Mutex<Option<Staging>>,
}

impl Device {
    /// Opens GPU number `ordinal`. The error says what is missing and what to do.
    pub fn open(ordinal: usize) -> Result<Self> {
        library::load_all()?;
        let context = CudaContext::new(ordinal).with_context(|| {
            format!("cannot open CUDA device {ordinal}; `nvidia-smi` lists what is there")
        })?;
        let (major, minor) = context.compute_capability()?;
        let architecture =
            compile::architecture(major, minor).with_context(|| context.name().unwrap_or_default())?;
        keep_freed_memory(&context)?;
        // Its own stream rather than the legacy default one, which graphs cannot record.
        let stream = context.new_stream()?;
        let shared_memory =
            context.attribute(CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN)?;
        let multiprocessors =
            context.attribute(CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?;
        Ok(Device {
            context,
            stream,
            architecture,
            can_overlap: major >= 9,
            shared_memory: shared_memory as u32,
            multiprocessors: multiprocessors as usize,
            functions: Mutex::default(),
            staging: Mutex::default(),
        })
    }

    /// Returns the stream all work is queued on.
    pub fn stream(&self) -> &Arc<CudaStream> {
        &self.stream
    }

    /// Returns e.g. `NVIDIA H100 80GB HBM3 (sm_90a)`.
    pub fn name(&self) -> String {
        format!("{} ({})", self.context.name().unwrap_or_else(|_| "CUDA device".into()), self.architecture)
    }

    /// Returns the most shared memory a block can have, bytes.
    pub fn shared_memory(&self) -> usize {
        self.shared_memory as usize
    }

    /// Returns how many multiprocessors it has.
    pub fn multiprocessors(&self) -> usize {
        self.multiprocessors
    }

    /// Returns (free, total) memory, bytes.
    pub fn memory(&self) -> Result<(usize, usize)> {
        Ok(self.context.mem_get_info()?)
    }

    /// Gives memory that is not in use back to the system.
    #[allow(unsafe_code)]
    pub fn give_back_memory(&self) -> Result<()> {
        self.synchronize()?;
        if self.context.has_async_alloc() {
            // SAFETY: the pool belongs to the open device; nothing in use is touched.
            unsafe {
                let pool = result::device::get_default_mem_pool(self.context.cu_device())?;
                result::mem_pool::trim_to(pool, 0)?;
            }
        }
        Ok(())
    }

    /// Waits until all queued work is done.
    pub fn synchronize(&self) -> Result<()> {
        self.stream.synchronize().context("work on the GPU failed")
    }

    /// Allocates memory with unknown contents, which the user writes before it is read. In builds with debug assertions they are
    /// zeros, so that a test gives the same result each time even if something is missed.
    #[allow(unsafe_code)]
    pub fn allocate(&self, bytes: usize) -> Result<Buffer> {
        // SAFETY: bytes of any value are valid u8, and only kernels see them before something is written.
        let slice = unsafe { self.stream.alloc::<u8>(bytes.max(1)) };
        let slice = slice.with_context(|| {
            let (free, total) = self.memory().unwrap_or_default();
            let mib = |bytes: usize| bytes >> 20;
            format!(
                "out of GPU memory: {} MiB wanted, {} of {} MiB free; use a smaller batch, or `--device cpu`",
                mib(bytes),
                mib(free),
                mib(total)
            )
        })?;
        let mut buffer = Buffer(slice);
        if cfg!(debug_assertions) {
            self.stream.memset_zeros(&mut buffer.0).context("writing zeros on the GPU failed")?;
        }
        Ok(buffer)
    }

    /// Copies bytes to the device.
    pub fn upload(&self, bytes: &[u8]) -> Result<Buffer> {
        let mut buffer = self.allocate(bytes.len())?;
        self.stream.memcpy_htod(bytes, &mut buffer.0).context("copying to the GPU failed")?;
        Ok(buffer)
    }

    /// Copies bytes into a buffer, from byte `at` on.
    #[allow(unsafe_code)]
    pub fn write(&self, buffer: &Buffer, at: usize, bytes: &[u8]) -> Result<()> {
        ensure!(at + bytes.len() <= buffer.bytes(), "a copy past the end of a buffer");
        self.context.bind_to_thread()?;
        // SAFETY: the range was just checked; memory that is not page-locked is read before the call returns.
        unsafe { result::memcpy_htod_async(buffer.at() + at as u64, bytes, self.stream.cu_stream()) }
            .context("copying to the GPU failed")
    }

    /// Copies numbers to the device as they lie in memory.
    #[allow(unsafe_code)]
    pub fn upload_numbers<T: DeviceRepr>(&self, values: &[T]) -> Result<Buffer> {
        let buffer = self.allocate(size_of_val(values))?;
        self.context.bind_to_thread()?;
        // SAFETY: the buffer was made for these bytes; memory that is not page-locked is read before the call returns.
        unsafe { result::memcpy_htod_async(buffer.at(), values, self.stream.cu_stream()) }
            .context("copying to the GPU failed")?;
        Ok(buffer)
    }

    /// Copies the first `out.len()` numbers from the device; bytes of any value must be such a number.
    #[allow(unsafe_code)]
    pub fn download_numbers<T: DeviceRepr + ValidAsZeroBits>(
        &self,
        buffer: &Buffer,
        out: &mut [T],
    ) -> Result<()> {
        ensure!(size_of_val(out) <= buffer.bytes(), "a copy past the end of a buffer");
        self.context.bind_to_thread()?;
        // SAFETY: the range was just checked; `out` lives until the copy is done, which is waited for.
        unsafe { result::memcpy_dtoh_async(out, buffer.at(), self.stream.cu_stream()) }
            .context("copying from the GPU failed")?;
        self.synchronize()
    }

    /// Shows `count` F32 numbers of a buffer piece by piece, `piece` at a time but for the last, each with the number of its
    /// first value. Pieces pass through page-locked memory that stays for the next time: fresh memory costs more than the
    /// copy.
    #[allow(unsafe_code)]
    pub fn read_pieces(
        &self,
        buffer: &Buffer,
        count: usize,
        piece: usize,
        see: &mut dyn FnMut(usize, &[f32]) -> Result<()>,
    ) -> Result<()> {
        ensure!(4 * count <= buffer.bytes(), "a copy past the end of a buffer");
        let mut staging = self.staging.lock().unwrap_or_else(PoisonError::into_inner);
        if staging.as_ref().is_none_or(|staging| staging.bytes < 4 * piece) {
            *staging = None;
            *staging = Some(Staging::new(&self.context, 4 * piece)?);
        }
        let Some(staging) = staging.as_mut() else { bail!("page-locked memory was just allocated") };
        for first in (0..count).step_by(piece) {
            let values = staging.values(piece.min(count - first));
            // SAFETY: the range was checked above; the copy is waited for before the values are looked at.
            unsafe {
                let from = buffer.at() + 4 * first as u64;
                result::memcpy_dtoh_async(values, from, self.stream.cu_stream())
            }
            .context("copying from the GPU failed")?;
            self.synchronize()?;
            see(first, values)?;
        }
        Ok(())
    }

    /// Allocates zeros.
    pub fn zeros(&self, bytes: usize) -> Result<Buffer> {
        let mut buffer = self.allocate(bytes)?;
        self.stream.memset_zeros(&mut buffer.0).context("writing zeros on the GPU failed")?;
        Ok(buffer)
    }

    /// Copies the first `out.len()` bytes from the device.
    pub fn download(&self, buffer: &Buffer, out: &mut [u8]) -> Result<()> {
        self.stream.memcpy_dtoh(&buffer.0.slice(..out.len()), out).context("copying from the GPU failed")?;
        self.synchronize()
    }

    /// Queues a copy of `bytes` bytes from one buffer, from byte `source` on, to byte `target` on of another.
    #[allow(unsafe_code)]
    pub fn copy(&self, from: &Buffer, source: usize, to: &Buffer, target: usize, bytes: usize) -> Result<()> {
        ensure!(
            source + bytes <= from.bytes() && target + bytes <= to.bytes(),
            "a copy past the end of a buffer"
        );
        self.context.bind_to_thread()?;
        let (from, to) = (from.at() + source as u64, to.at() + target as u64);
        // SAFETY: both ranges were just checked, and both buffers are freed in stream order.
        unsafe { result::memcpy_dtod_async(to, from, bytes, self.stream.cu_stream()) }
            .context("copying on the GPU failed")
    }

    /// Returns a copy on the device.
    pub fn duplicate(&self, buffer: &Buffer) -> Result<Buffer> {
        Ok(Buffer(self.stream.clone_dtod(&buffer.0)?))
    }

    /// Queues a kernel. Its source says what it takes, which is checked; sizes, alignment and the layout of structs are
    /// the caller's to keep, as the kernel's header says.
    pub fn launch(&self, kernel: Kernel, geometry: Geometry, args: &[Arg]) -> Result<()> {
        self.queue(kernel, geometry, args, false)
    }

    /// The same for a kernel that waits for its predecessor itself (`wait_for_predecessor` in common.cuh), so that its
    /// start overlaps the predecessor's end. On GPUs older than sm_90 a plain launch.
    pub fn launch_overlapping(&self, kernel: Kernel, geometry: Geometry, args: &[Arg]) -> Result<()> {
        self.queue(kernel, geometry, args, self.can_overlap)
    }

    #[allow(unsafe_code)]
    fn queue(&self, kernel: Kernel, geometry: Geometry, args: &[Arg], overlapping: bool) -> Result<()> {
        let [x, y, z] = geometry.grid;
        if x * y * z == 0 {
            return Ok(());
        }
        ensure!(y <= 65535 && z <= 65535 && x < 1 << 31, "kernel `{}`: grid {x} x {y} x {z}", kernel.name);
        let name = kernel.name;
        let loaded = self.loaded(kernel, geometry.shared)?;
        ensure!(
            args.iter().map(Arg::parameter).eq(loaded.parameters.iter().copied()),
            "kernel `{name}` takes {:?}, not {:?}",
            loaded.parameters,
            args.iter().map(Arg::parameter).collect::<Vec<_>>()
        );
        let mut addresses: Vec<*mut c_void> = args
            .iter()
            .map(|arg| match arg {
                Arg::Pointer(value) => std::ptr::from_ref(value).cast_mut().cast(),
                Arg::U32(value) => std::ptr::from_ref(value).cast_mut().cast(),
                Arg::U64(value) => std::ptr::from_ref(value).cast_mut().cast(),
                Arg::F32(value) => std::ptr::from_ref(value).cast_mut().cast(),
                Arg::Struct(words) => words.as_ptr().cast_mut().cast(),
            })
            .collect();
        let mut attribute = CUlaunchAttribute {
            id: CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION,
            pad: [0; 4],
            value: CUlaunchAttributeValue { programmaticStreamSerializationAllowed: 1 },
        };
        let config = CUlaunchConfig {
            gridDimX: x as u32,
            gridDimY: y as u32,
            gridDimZ: z as u32,
            blockDimX: geometry.block[0],
            blockDimY: geometry.block[1],
            blockDimZ: 1,
            sharedMemBytes: geometry.shared,
            hStream: self.stream.cu_stream(),
            attrs: &raw mut attribute,
            numAttrs: u32::from(overlapping),
        };
        self.context.bind_to_thread()?;
        // SAFETY: the arguments are as many and of such types as the kernel's source says, and live until the call
        // returns, which copies them; memory they point to is freed in stream order, so after this kernel; sizes are the
        // launcher's contract, checked by tests/parity.
        unsafe {
            let function = loaded.function.cu_function();
            cuLaunchKernelEx(&raw const config, function, addresses.as_mut_ptr(), null_mut())
        }
        .result()
        .with_context(|| format!("kernel `{name}` does not start"))
    }

    /// Lets a kernel have all shared memory of a block, and prefers shared memory to L1 cache: launches overlap only where
    /// neither has to change the division.
    fn allow_shared_memory(&self, function: &CudaFunction) -> Result<()> {
        use CUfunction_attribute as Attribute;
        let own = function.get_attribute(Attribute::CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES)?;
        let all = self.shared_memory as i32 - own;
        function.set_attribute(Attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES, all)?;
        function.set_attribute(Attribute::CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT, 100)?;
        Ok(())
    }

    /// Returns the compiled and loaded kernel.
    fn loaded(&self, kernel: Kernel, shared: u32) -> Result<Arc<Loaded>> {
        let mut functions = self.functions.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(loaded) = functions.get(&kernel) {
            return Ok(loaded.clone());
        }
        ensure!(
            shared <= self.shared_memory,
            "kernel `{}` needs {shared} bytes of shared memory a block; this GPU has {}",
            kernel.name,
            self.shared_memory
        );
        let parameters = signature::of(&kernel.source()?, kernel.name)?;
        let code = compile::compile(&kernel, &self.architecture)?;
        let module = self.context.load_module(Ptx::from_binary(code));
        let function = module
            .and_then(|module| module.load_function(kernel.name))
            .with_context(|| format!("kernel `{}` does not load", kernel.name))?;
        self.allow_shared_memory(&function)
            .with_context(|| format!("kernel `{}` gets no shared memory", kernel.name))?;
        let loaded = Arc::new(Loaded { function, parameters });
        functions.insert(kernel, loaded.clone());
        Ok(loaded)
    }
}

/// Page-locked memory of this process.
struct Staging {
    at: *mut f32,
    bytes: usize,
    context: Arc<CudaContext>,
}

// SAFETY: plain memory, used by whoever holds the lock around it.
#[allow(unsafe_code)]
unsafe impl Send for Staging {}

impl Staging {
    #[allow(unsafe_code)]
    fn new(context: &Arc<CudaContext>, bytes: usize) -> Result<Self> {
        context.bind_to_thread()?;
        // SAFETY: no requirement; the memory is zeroed so that every value of it is a number.
        let at = unsafe {
            let at = result::malloc_host(bytes, 0).context("no page-locked memory")?;
            std::ptr::write_bytes(at.cast::<u8>(), 0, bytes);
            at.cast()
        };
        Ok(Staging { at, bytes, context: context.clone() })
    }

    /// Returns the first `count` numbers.
    #[allow(unsafe_code)]
    fn values(&mut self, count: usize) -> &mut [f32] {
        assert!(4 * count <= self.bytes, "more numbers than there is memory for");
        // SAFETY: the memory is as long as just checked, aligned to pages, initialised, and borrowed with `self`.
        unsafe { std::slice::from_raw_parts_mut(self.at, count) }
    }
}

impl Drop for Staging {
    #[allow(unsafe_code)]
    fn drop(&mut self) {
        if self.context.bind_to_thread().is_ok() {
            // SAFETY: allocated by `new`, freed once. Errors at the end of a process help nobody.
            unsafe { result::free_host(self.at.cast()) }.ok();
        }
    }
}

/// Tells the allocator to keep freed memory for the next request instead of giving it back at each synchronisation.
#[allow(unsafe_code)]
fn keep_freed_memory(context: &Arc<CudaContext>) -> Result<()> {
    // SAFETY: one stream does all the work, so events that order several streams are not needed.
    unsafe { context.disable_event_tracking() };
    if !context.has_async_alloc() {
        return Ok(());
    }
    let mut threshold = u64::MAX;
    // SAFETY: the pool belongs to the open device; the attribute is a u64.
    unsafe {
        let pool = result::device::get_default_mem_pool(context.cu_device())?;
        let attribute = CUmemPool_attribute::CU_MEMPOOL_ATTR_RELEASE_THRESHOLD;
        result::mem_pool::set_attribute(pool, attribute, std::ptr::from_mut(&mut threshold).cast())?;
    }
    Ok(())
}

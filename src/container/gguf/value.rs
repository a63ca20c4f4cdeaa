//! Metadata of a GGUF file: typed values under unique keys, in file order.

use anyhow::{Context, Result, bail};

/// Type of a value; the number is its id in the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[allow(missing_docs)]
pub enum Kind {
    U8 = 0,
    I8 = 1,
    U16 = 2,
    I16 = 3,
    U32 = 4,
    I32 = 5,
    F32 = 6,
    Bool = 7,
    String = 8,
    Array = 9,
    U64 = 10,
    I64 = 11,
    F64 = 12,
}

impl Kind {
    /// All kinds in the order of their ids.
    pub const ALL: [Kind; 13] = [
        Kind::U8,
        Kind::I8,
        Kind::U16,
        Kind::I16,
        Kind::U32,
        Kind::I32,
        Kind::F32,
        Kind::Bool,
        Kind::String,
        Kind::Array,
        Kind::U64,
        Kind::I64,
        Kind::F64,
    ];

    /// Returns the fewest bytes a value of this kind takes.
    pub(super) const fn min_bytes(self) -> u64 {
        match self {
            Kind::U8 | Kind::I8 | Kind::Bool => 1,
            Kind::U16 | Kind::I16 => 2,
            Kind::U32 | Kind::I32 | Kind::F32 => 4,
            Kind::String | Kind::U64 | Kind::I64 | Kind::F64 => 8,
            Kind::Array => 12,
        }
    }
}

/// A metadata value. Loaders check its kind strictly: where a `u32` is documented, an `i32` fails.
#[derive(Clone, Debug, PartialEq)]
#[allow(missing_docs)]
pub enum Value {
    U8(u8),
    I8(i8),
    U16(u16),
    I16(i16),
    U32(u32),
    I32(i32),
    F32(f32),
    Bool(bool),
    String(String),
    Array(Array),
    U64(u64),
    I64(i64),
    F64(f64),
}

impl Value {
    /// Returns the kind.
    pub fn kind(&self) -> Kind {
        match self {
            Value::U8(_) => Kind::U8,
            Value::I8(_) => Kind::I8,
            Value::U16(_) => Kind::U16,
            Value::I16(_) => Kind::I16,
            Value::U32(_) => Kind::U32,
            Value::I32(_) => Kind::I32,
            Value::F32(_) => Kind::F32,
            Value::Bool(_) => Kind::Bool,
            Value::String(_) => Kind::String,
            Value::Array(_) => Kind::Array,
            Value::U64(_) => Kind::U64,
            Value::I64(_) => Kind::I64,
            Value::F64(_) => Kind::F64,
        }
    }

    /// Returns any non-negative integer.
    pub fn as_u64(&self) -> Option<u64> {
        match *self {
            Value::U8(v) => Some(v.into()),
            Value::U16(v) => Some(v.into()),
            Value::U32(v) => Some(v.into()),
            Value::U64(v) => Some(v),
            Value::I8(v) => v.try_into().ok(),
            Value::I16(v) => v.try_into().ok(),
            Value::I32(v) => v.try_into().ok(),
            Value::I64(v) => v.try_into().ok(),
            _ => None,
        }
    }

    /// Returns any float.
    pub fn as_f64(&self) -> Option<f64> {
        match *self {
            Value::F32(v) => Some(v.into()),
            Value::F64(v) => Some(v),
            _ => None,
        }
    }

    /// Returns a boolean.
    pub fn as_bool(&self) -> Option<bool> {
        match *self {
            Value::Bool(v) => Some(v),
            _ => None,
        }
    }

    /// Returns a string.
    pub fn as_str(&self) -> Option<&str> {
        match self {
            Value::String(v) => Some(v),
            _ => None,
        }
    }

    /// Returns an array.
    pub fn as_array(&self) -> Option<&Array> {
        match self {
            Value::Array(array) => Some(array),
            _ => None,
        }
    }
}

/// Items of one kind, no arrays among them; they take about as much memory as in the file.
#[derive(Clone, Debug, PartialEq)]
#[allow(missing_docs)]
pub enum Array {
    U8(Vec<u8>),
    I8(Vec<i8>),
    U16(Vec<u16>),
    I16(Vec<i16>),
    U32(Vec<u32>),
    I32(Vec<i32>),
    F32(Vec<f32>),
    Bool(Vec<bool>),
    String(Vec<String>),
    U64(Vec<u64>),
    I64(Vec<i64>),
    F64(Vec<f64>),
}

/// Does the same with the items of every kind.
macro_rules! each_kind {
    ($array:expr, $items:ident => $result:expr) => {
        match $array {
            Array::U8($items) => $result,
            Array::I8($items) => $result,
            Array::U16($items) => $result,
            Array::I16($items) => $result,
            Array::U32($items) => $result,
            Array::I32($items) => $result,
            Array::F32($items) => $result,
            Array::Bool($items) => $result,
            Array::String($items) => $result,
            Array::U64($items) => $result,
            Array::I64($items) => $result,
            Array::F64($items) => $result,
        }
    };
}

impl Array {
    /// Returns the number of items.
    pub fn len(&self) -> usize {
        each_kind!(self, items => items.len())
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Returns the kind of the items.
    pub fn kind(&self) -> Kind {
        match self {
            Array::U8(_) => Kind::U8,
            Array::I8(_) => Kind::I8,
            Array::U16(_) => Kind::U16,
            Array::I16(_) => Kind::I16,
            Array::U32(_) => Kind::U32,
            Array::I32(_) => Kind::I32,
            Array::F32(_) => Kind::F32,
            Array::Bool(_) => Kind::Bool,
            Array::String(_) => Kind::String,
            Array::U64(_) => Kind::U64,
            Array::I64(_) => Kind::I64,
            Array::F64(_) => Kind::F64,
        }
    }

    /// Returns the items one by one.
    pub fn values(&self) -> Box<dyn Iterator<Item = Value> + '_> {
        each_kind!(self, items => Box::new(items.iter().cloned().map(Value::from)))
    }

    /// Returns strings.
    pub fn as_strings(&self) -> Option<&[String]> {
        match self {
            Array::String(items) => Some(items),
            _ => None,
        }
    }
}

macro_rules! from_primitive {
    ($($kind:ident: $primitive:ty),*) => {$(
        impl From<$primitive> for Value {
            fn from(value: $primitive) -> Self {
                Value::$kind(value.into())
            }
        }

        impl From<Vec<$primitive>> for Value {
            fn from(values: Vec<$primitive>) -> Self {
                Value::Array(Array::$kind(values.into_iter().map(Into::into).collect()))
            }
        }
    )*};
}

from_primitive!(U8: u8, I8: i8, U16: u16, I16: i16, U32: u32, I32: i32, F32: f32, Bool: bool, String: String,
    String: &str, U64: u64, I64: i64, F64: f64);

/// Typed values under unique keys, in file order.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Metadata(pub Vec<(String, Value)>);

impl Metadata {
    /// Returns the value of a key.
    pub fn get(&self, key: &str) -> Option<&Value> {
        self.0.iter().find(|(k, _)| k == key).map(|(_, value)| value)
    }

    /// Sets a key, in place if it exists, else at the end.
    pub fn set(&mut self, key: &str, value: impl Into<Value>) {
        match self.0.iter_mut().find(|(k, _)| k == key) {
            Some((_, old)) => *old = value.into(),
            None => self.0.push((key.to_string(), value.into())),
        }
    }

    /// Returns a non-negative integer; an error if the key is missing or of another kind.
    pub fn size(&self, key: &str) -> Result<usize> {
        self.typed(key, "a non-negative integer", |value| value.as_u64()?.try_into().ok())
    }

    /// Returns a float; an error if the key is missing or of another kind.
    pub fn float(&self, key: &str) -> Result<f32> {
        self.typed(key, "a float", |value| value.as_f64().map(|v| v as f32))
    }

    /// Returns a string; an error if the key is missing or of another kind.
    pub fn str(&self, key: &str) -> Result<&str> {
        self.typed(key, "a string", Value::as_str)
    }

    fn typed<'a, T>(&'a self, key: &str, wanted: &str, get: impl Fn(&'a Value) -> Option<T>) -> Result<T> {
        let value = self.get(key).with_context(|| format!("GGUF key `{key}` is missing, wanted {wanted}"))?;
        match get(value) {
            Some(found) => Ok(found),
            None => bail!("GGUF key `{key}` is of type {:?}, wanted {wanted}", value.kind()),
        }
    }
}

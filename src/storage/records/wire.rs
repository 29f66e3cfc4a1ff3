//! Numbers and bytes, in and out: the small vocabulary of the log and of rows.
//!
//! Numbers are little-endian base-128 varints unless said otherwise. Reading believes nothing: every length is compared with
//! what is left before it is used, and a varint has exactly one accepted form.

use bytes::Bytes;

/// Bytes that are not what the format says.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{what} at byte {at}")]
pub struct DecodeError {
    /// What is wrong.
    pub what: &'static str,
    /// Where, counted from the start of the record.
    pub at: usize,
}

/// Appends a number.
#[inline]
pub(super) fn put_varint(out: &mut Vec<u8>, mut value: u64) {
    while value >= 0x80 {
        out.push(value as u8 | 0x80);
        value >>= 7;
    }
    out.push(value as u8);
}

/// Appends a signed number: small absolute values are short.
#[inline]
pub(super) fn put_signed(out: &mut Vec<u8>, value: i64) {
    put_varint(
        out,
        (value.cast_unsigned() << 1) ^ (value >> 63).cast_unsigned(),
    );
}

/// Appends a length and the bytes.
#[inline]
pub(super) fn put_bytes(out: &mut Vec<u8>, bytes: &[u8]) {
    put_varint(out, bytes.len() as u64);
    out.extend_from_slice(bytes);
}

/// Reads a record from its start.
pub(super) struct Reader<'a> {
    source: &'a Bytes,
    at: usize,
}

impl<'a> Reader<'a> {
    pub(super) fn new(source: &'a Bytes) -> Self {
        Self { source, at: 0 }
    }

    #[cold]
    pub(super) fn error(&self, what: &'static str) -> DecodeError {
        DecodeError { what, at: self.at }
    }

    pub(super) fn remaining(&self) -> usize {
        self.source.len() - self.at
    }

    /// Refuses bytes after the end.
    pub(super) fn finish(&self) -> Result<(), DecodeError> {
        if self.remaining() == 0 {
            Ok(())
        } else {
            Err(self.error("bytes after the end"))
        }
    }

    #[inline]
    pub(super) fn u8(&mut self) -> Result<u8, DecodeError> {
        let byte = *self
            .source
            .get(self.at)
            .ok_or_else(|| self.error("the end is missing"))?;
        self.at += 1;
        Ok(byte)
    }

    #[inline]
    pub(super) fn varint(&mut self) -> Result<u64, DecodeError> {
        let first = self.u8()?;
        if first < 0x80 {
            return Ok(u64::from(first));
        }
        let mut value = u64::from(first & 0x7f);
        let mut shift = 7;
        loop {
            let byte = self.u8()?;
            let bits = u64::from(byte & 0x7f);
            if shift == 63 && bits > 1 {
                return Err(self.error("a number over 64 bits"));
            }
            value |= bits << shift;
            if byte < 0x80 {
                if byte == 0 {
                    return Err(self.error("a number in a longer form than needed"));
                }
                return Ok(value);
            }
            shift += 7;
            if shift > 63 {
                return Err(self.error("a number over 64 bits"));
            }
        }
    }

    #[inline]
    pub(super) fn varint32(&mut self) -> Result<u32, DecodeError> {
        u32::try_from(self.varint()?).map_err(|_| self.error("a number over 32 bits"))
    }

    #[inline]
    pub(super) fn signed(&mut self) -> Result<i64, DecodeError> {
        let raw = self.varint()?;
        Ok((raw >> 1).cast_signed() ^ -(raw & 1).cast_signed())
    }

    /// A count of things that take at least `each` bytes: never more than can be left.
    pub(super) fn count(&mut self, each: usize) -> Result<usize, DecodeError> {
        let count = self.varint()?;
        let most = (self.remaining() / each.max(1)) as u64;
        if count > most {
            return Err(self.error("a count of more than there is"));
        }
        Ok(count as usize)
    }

    #[inline]
    pub(super) fn array<const N: usize>(&mut self) -> Result<[u8; N], DecodeError> {
        let end = self.at + N;
        let bytes = self
            .source
            .get(self.at..end)
            .ok_or_else(|| self.error("the end is missing"))?;
        self.at = end;
        let mut array = [0; N];
        array.copy_from_slice(bytes);
        Ok(array)
    }

    /// A fixed-width number.
    #[inline]
    pub(super) fn u64(&mut self) -> Result<u64, DecodeError> {
        Ok(u64::from_le_bytes(self.array()?))
    }

    /// A slice that shares memory with the record.
    pub(super) fn slice(&mut self, length: usize) -> Result<Bytes, DecodeError> {
        if length > self.remaining() {
            return Err(self.error("a length of more than there is"));
        }
        let slice = self.source.slice(self.at..self.at + length);
        self.at += length;
        Ok(slice)
    }

    pub(super) fn bytes(&mut self) -> Result<Bytes, DecodeError> {
        let length = self.count(1)?;
        self.slice(length)
    }

    pub(super) fn raw(&mut self, length: usize) -> Result<&'a [u8], DecodeError> {
        if length > self.remaining() {
            return Err(self.error("a length of more than there is"));
        }
        let bytes = &self.source[self.at..self.at + length];
        self.at += length;
        Ok(bytes)
    }

    pub(super) fn str(&mut self) -> Result<&'a str, DecodeError> {
        let length = self.count(1)?;
        let bytes = self.raw(length)?;
        std::str::from_utf8(bytes).map_err(|_| self.error("text that is not UTF-8"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_come_back_in_one_form() {
        let cases = [
            0,
            1,
            127,
            128,
            300,
            16_383,
            16_384,
            u64::from(u32::MAX),
            u64::MAX - 1,
            u64::MAX,
        ];
        for value in cases {
            let mut out = Vec::new();
            put_varint(&mut out, value);
            let bytes = Bytes::from(out);
            let mut reader = Reader::new(&bytes);
            assert_eq!(reader.varint(), Ok(value));
            assert!(reader.finish().is_ok());
            for signed in [value.cast_signed(), value.cast_signed().wrapping_neg()] {
                let mut out = Vec::new();
                put_signed(&mut out, signed);
                let bytes = Bytes::from(out);
                assert_eq!(Reader::new(&bytes).signed(), Ok(signed));
            }
        }
        for bad in [
            &[0x80, 0x00][..],
            &[0x80],
            &[],
            &[0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x02],
            &[
                0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x01,
            ],
        ] {
            let bytes = Bytes::copy_from_slice(bad);
            assert!(Reader::new(&bytes).varint().is_err(), "{bad:?}");
        }
    }

    #[test]
    fn a_length_is_not_believed() {
        let mut out = Vec::new();
        put_varint(&mut out, u64::MAX >> 1);
        out.extend_from_slice(b"abc");
        let bytes = Bytes::from(out);
        assert!(Reader::new(&bytes).bytes().is_err());
        assert!(Reader::new(&bytes).count(4).is_err());
        assert!(Reader::new(&bytes).str().is_err());
    }
}

//! A store as one file of a few hundred kilobytes: log segments and sled's file are mostly zeros, which are left out.
//!
//! ```text
//! dir PATH
//! file PATH LENGTH
//! at OFFSET LENGTH        of the file above, followed by that many bytes and a newline; what is not said is zeros
//! ```

use std::collections::BTreeMap;
use std::fs;
use std::io::{Seek, SeekFrom, Write};
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::path::{Path, PathBuf};

/// Zeros are left out in units of this.
const BLOCK: usize = 64;

/// Everything below a directory, by its path in it, sorted: content of files, `None` for directories.
pub(crate) fn content(dir: &Path) -> BTreeMap<PathBuf, Option<Vec<u8>>> {
    let mut all = BTreeMap::new();
    let mut open = vec![dir.to_owned()];
    while let Some(at) = open.pop() {
        for entry in fs::read_dir(&at).unwrap() {
            let path = entry.unwrap().path();
            let name = path.strip_prefix(dir).unwrap().to_owned();
            if path.is_dir() {
                all.insert(name, None);
                open.push(path);
            } else {
                all.insert(name, Some(fs::read(&path).unwrap()));
            }
        }
    }
    all
}

/// Where something is, as `(start, end)`.
fn extents(bytes: &[u8]) -> Vec<(usize, usize)> {
    let mut found: Vec<(usize, usize)> = Vec::new();
    for (number, block) in bytes.chunks(BLOCK).enumerate() {
        if block.iter().all(|byte| *byte == 0) {
            continue;
        }
        let (start, end) = (number * BLOCK, number * BLOCK + block.len());
        match found.last_mut() {
            Some(last) if last.1 == start => last.1 = end,
            _ => found.push((start, end)),
        }
    }
    found
}

/// Writes what is in a directory to a file.
pub(crate) fn pack(dir: &Path, image: &Path) {
    let mut out = Vec::new();
    for (path, content) in content(dir) {
        let Some(bytes) = content else {
            writeln!(out, "dir {}", path.display()).unwrap();
            continue;
        };
        writeln!(out, "file {} {}", path.display(), bytes.len()).unwrap();
        for (start, end) in extents(&bytes) {
            writeln!(out, "at {start} {}", end - start).unwrap();
            out.extend_from_slice(&bytes[start..end]);
            out.push(b'\n');
        }
    }
    fs::write(image, out).unwrap();
}

/// Makes a directory of such a file.
pub(crate) fn unpack(image: &Path, dir: &Path) {
    let bytes = fs::read(image).unwrap_or_else(|error| panic!("{}: {error}", image.display()));
    fs::create_dir(dir).unwrap();
    fs::set_permissions(dir, fs::Permissions::from_mode(0o700)).unwrap();
    let mut file: Option<fs::File> = None;
    let mut rest = &bytes[..];
    while !rest.is_empty() {
        let end = rest.iter().position(|byte| *byte == b'\n').unwrap();
        let line = std::str::from_utf8(&rest[..end]).unwrap();
        rest = &rest[end + 1..];
        let words: Vec<&str> = line.split(' ').collect();
        match words[..] {
            ["dir", path] => fs::create_dir_all(dir.join(path)).unwrap(),
            ["file", path, length] => {
                let path = dir.join(path);
                fs::create_dir_all(path.parent().unwrap()).unwrap();
                let mut new = fs::File::create(path).unwrap();
                new.set_len(length.parse().unwrap()).unwrap();
                new.seek(SeekFrom::Start(0)).unwrap();
                file = Some(new);
            }
            ["at", offset, length] => {
                let length: usize = length.parse().unwrap();
                let file = file.as_ref().expect("a file before its bytes");
                file.write_all_at(&rest[..length], offset.parse().unwrap())
                    .unwrap();
                rest = &rest[length + 1..];
            }
            _ => panic!("{}: {line:?}", image.display()),
        }
    }
}

/// Where the golden files of a version are.
pub(crate) fn golden(version: u32) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("tests/golden/v{version}"))
}

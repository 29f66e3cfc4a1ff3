//! Torn tails, damage, recycled segments: what a start must take, and what it must refuse.

use std::os::unix::fs::FileExt;

use super::*;

const SIZE: u64 = 16 << 10;

struct Bench {
    _dir: tempfile::TempDir,
    identity: LogIdentity,
    start: LogPlace,
}

impl Bench {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let identity = LogIdentity {
            dir: dir.path().join("log"),
            store_id: *b"0123456789abcdef",
            segment_bytes: SIZE,
        };
        let start = Log::create(&identity).unwrap();
        Self {
            _dir: dir,
            identity,
            start,
        }
    }

    fn open(&self) -> Log {
        self.read(self.start).unwrap().0
    }

    fn read(&self, from: LogPlace) -> Result<(Log, Vec<Replayed>), StorageError> {
        let mut found = Vec::new();
        let log = Log::open(self.identity.clone(), from, &mut |entry| {
            found.push(entry);
            Ok(())
        })?;
        Ok((log, found))
    }

    fn bodies(&self) -> Result<Vec<Vec<u8>>, StorageError> {
        let (_, found) = self.read(self.start)?;
        Ok(found
            .into_iter()
            .filter_map(|entry| entry.body.map(|body| body.to_vec()))
            .collect())
    }

    fn segment(&self, number: u64) -> PathBuf {
        segment::path(&self.identity.dir, number)
    }

    /// Changes bytes of the log at a position.
    fn poke(&self, position: u64, change: impl Fn(&mut [u8]), length: usize) {
        let file = std::fs::OpenOptions::new()
            .read(true)
            .write(true)
            .open(self.segment(position / SIZE))
            .unwrap();
        let mut bytes = vec![0; length];
        file.read_exact_at(&mut bytes, position % SIZE).unwrap();
        change(&mut bytes);
        file.write_all_at(&bytes, position % SIZE).unwrap();
    }
}

fn append(log: &mut Log, body: &[u8]) -> LogPlace {
    let now = Timestamp(log.place().sequence);
    log.append(now, WallTime(9), |out| out.extend_from_slice(body))
        .unwrap()
}

fn is_corrupt<T>(result: &Result<T, StorageError>) -> bool {
    matches!(result, Err(StorageError::Corrupt { .. }))
}

#[test]
fn entries_come_back_each_with_its_own_place() {
    let bench = Bench::new();
    let mut log = bench.open();
    let places: Vec<_> = (1..=5usize)
        .map(|n| append(&mut log, &vec![n as u8; n * 10]))
        .collect();
    log.seal(Timestamp(9), WallTime(10)).unwrap();
    let end = log.place();
    drop(log);
    let (log, found) = bench.read(bench.start).unwrap();
    assert_eq!(log.place(), end);
    assert!(log.is_sealed());
    let facts: Vec<_> = found.iter().filter(|e| e.body.is_some()).collect();
    assert_eq!(facts.iter().map(|e| e.after).collect::<Vec<_>>(), places);
    drop(log);
    let (_, later) = bench.read(places[2]).unwrap();
    assert_eq!(later, found[3..], "a start from the middle reads the rest");
}

#[test]
fn a_tail_cut_at_any_byte_loses_only_the_last_entry() {
    let bench = Bench::new();
    let mut log = bench.open();
    append(&mut log, b"first");
    let before = append(&mut log, b"second");
    let after = append(&mut log, &[7; 61]);
    drop(log);
    let length = (after.position - before.position) as usize;
    let mut whole = vec![0; length];
    bench.poke(before.position, |_| {}, length);
    let file = std::fs::File::open(bench.segment(1)).unwrap();
    file.read_exact_at(&mut whole, before.position % SIZE)
        .unwrap();
    for filler in [0u8, 0xff] {
        for cut in 0..length {
            bench.poke(
                before.position,
                |bytes| {
                    bytes.copy_from_slice(&whole);
                    bytes[cut..].fill(filler);
                },
                length,
            );
            let bodies = bench.bodies().unwrap();
            // The zeros that fill up to a multiple of eight are not part of the entry.
            let kept = if cut >= 40 + 61 { 3 } else { 2 };
            assert_eq!(bodies.len(), kept, "cut at {cut} with {filler:x}");
        }
    }
    // The log goes on over the torn entry.
    bench.poke(before.position, |bytes| bytes[50] ^= 1, length);
    let mut log = bench.open();
    assert_eq!(log.place(), before);
    append(&mut log, b"again");
    drop(log);
    assert_eq!(
        bench.bodies().unwrap(),
        [&b"first"[..], b"second", b"again"]
    );
}

#[test]
fn damage_before_a_later_entry_or_seal_is_refused() {
    for sealed in [false, true] {
        let bench = Bench::new();
        let mut log = bench.open();
        let mut places = vec![log.place()];
        for n in 0..4u8 {
            places.push(append(&mut log, &[n; 33]));
        }
        if sealed {
            log.seal(Timestamp(1), WallTime(1)).unwrap();
        }
        drop(log);
        for (n, pair) in places.windows(2).enumerate() {
            let (from, to) = (pair[0].position, pair[1].position);
            let entry = (to - from) as usize;
            for byte in 0..entry {
                for bit in [0, 3, 7] {
                    let flip = |bytes: &mut [u8]| bytes[byte] ^= 1 << bit;
                    bench.poke(from, flip, entry);
                    let result = bench.bodies();
                    bench.poke(from, flip, entry);
                    let in_padding = byte >= 40 + 33;
                    let is_last = n == 3 && !sealed;
                    if in_padding {
                        assert_eq!(result.unwrap().len(), 4);
                    } else if is_last {
                        assert_eq!(result.unwrap().len(), 3, "byte {byte}");
                    } else {
                        assert!(is_corrupt(&result), "entry {n}, byte {byte}, bit {bit}");
                    }
                }
            }
        }
        assert_eq!(bench.bodies().unwrap().len(), 4, "all was put back");
    }
}

#[test]
fn a_block_of_zeros_before_a_later_segment_is_refused() {
    let bench = Bench::new();
    let mut log = bench.open();
    while log.place().position < 3 * SIZE {
        append(&mut log, &[1; 1_000]);
    }
    drop(log);
    let count = bench.bodies().unwrap().len();
    assert!(count > 30);
    for segment in [1, 2] {
        let saved = std::fs::read(bench.segment(segment)).unwrap();
        for (from, to) in [
            (SEGMENT_HEADER, SIZE),
            (4_096, 8_192),
            (8_192, SIZE),
            (0, 64),
        ] {
            bench.poke(
                segment * SIZE + from,
                |bytes| bytes.fill(0),
                (to - from) as usize,
            );
            assert!(
                is_corrupt(&bench.bodies()),
                "segment {segment}, {from}..{to}"
            );
            std::fs::write(bench.segment(segment), &saved).unwrap();
        }
        std::fs::write(bench.segment(segment), &saved[..9_000]).unwrap();
        assert!(is_corrupt(&bench.bodies()), "segment {segment} cut");
        std::fs::remove_file(bench.segment(segment)).unwrap();
        assert!(is_corrupt(&bench.bodies()), "segment {segment} missing");
        std::fs::write(bench.segment(segment), &saved).unwrap();
    }
    // The last segment is known from the end of the one before, even if nothing follows.
    std::fs::remove_file(bench.segment(3)).unwrap();
    assert!(is_corrupt(&bench.bodies()));
}

#[test]
fn recycled_segments_never_show_their_old_entries() {
    let bench = Bench::new();
    let mut log = bench.open();
    let mut recycled = false;
    let mut from = log.place();
    for round in 0..200u32 {
        let place = append(&mut log, &round.to_le_bytes().repeat(100));
        if round % 7 == 0 {
            log.shorten(place.position);
            from = place;
        }
        if round % 13 == 0 {
            drop(log);
            let (reopened, found) = bench.read(from).unwrap();
            assert_eq!(reopened.place(), place);
            assert_eq!(
                found.len() as u64,
                place.sequence - from.sequence - rolls(from.position, place.position)
            );
            log = reopened;
            let next = bench.segment(place.position / SIZE + 1);
            if let Ok(bytes) = std::fs::read(next) {
                recycled |= bytes[64..].iter().any(|b| *b != 0);
            }
        }
    }
    assert!(recycled, "no segment was used again, so nothing was tested");
    drop(log);
    let files = std::fs::read_dir(&bench.identity.dir).unwrap().count();
    assert!(files <= 6, "{files} segments are kept");
}

/// Each step into the next segment takes a number.
fn rolls(from: u64, to: u64) -> u64 {
    to / SIZE - from / SIZE
}

#[test]
fn an_entry_too_large_stops_the_log() {
    let bench = Bench::new();
    let mut log = bench.open();
    append(&mut log, b"good");
    let large = vec![0; SIZE as usize];
    let error = log.append(Timestamp(1), WallTime(1), |out| {
        out.extend_from_slice(&large);
    });
    assert!(matches!(error, Err(StorageError::State { .. })));
    let refused = log.append(Timestamp(1), WallTime(1), |out| out.push(1));
    assert!(matches!(refused, Err(StorageError::Stopped(_))), "G17");
    drop(log);
    assert_eq!(bench.bodies().unwrap(), [b"good"]);
}

#[test]
fn entries_of_every_size_fit_the_end_of_a_segment() {
    let bench = Bench::new();
    let mut log = bench.open();
    let largest = SIZE as usize - 64 - 40 - 40;
    let mut sizes = Vec::new();
    for n in 0..60usize {
        let size =
            [1, 7, 8, 1_999, largest, largest - 1, 4_000][n % 7] - n % 2 * usize::from(n % 7 > 2);
        sizes.push(size);
        append(&mut log, &vec![n as u8; size]);
    }
    drop(log);
    let found: Vec<_> = bench.bodies().unwrap().iter().map(Vec::len).collect();
    assert_eq!(found, sizes);
}

#[test]
fn another_stores_segment_is_refused() {
    let bench = Bench::new();
    let mut log = bench.open();
    append(&mut log, b"mine");
    drop(log);
    let mut other = bench.identity.clone();
    other.store_id[0] ^= 1;
    assert!(is_corrupt(
        &Log::open(other, bench.start, &mut |_| Ok(())).map(|_| ())
    ));
}

#[test]
fn a_half_made_segment_is_removed() {
    let bench = Bench::new();
    std::fs::write(bench.identity.dir.join(prepare::UNFINISHED), b"half").unwrap();
    std::fs::write(bench.segment(2), b"short").unwrap();
    let mut log = bench.open();
    for _ in 0..40 {
        append(&mut log, &[3; 1_000]);
    }
    drop(log);
    assert_eq!(bench.bodies().unwrap().len(), 40);
}

/// A segment that is larger than what is read at once and than what is filled ahead.
const LARGE: u64 = 4 << 20;

fn large() -> (tempfile::TempDir, LogIdentity, LogPlace) {
    let dir = tempfile::tempdir().unwrap();
    let identity = LogIdentity {
        dir: dir.path().join("log"),
        store_id: *b"0123456789abcdef",
        segment_bytes: LARGE,
    };
    let start = Log::create(&identity).unwrap();
    (dir, identity, start)
}

fn lengths(identity: &LogIdentity, from: LogPlace) -> Result<Vec<usize>, StorageError> {
    let mut found = Vec::new();
    Log::open(identity.clone(), from, &mut |entry| {
        found.extend(entry.body.map(|body| body.len()));
        Ok(())
    })?;
    Ok(found)
}

#[test]
fn entries_longer_than_a_piece_and_across_pieces_come_back() {
    let (_dir, identity, start) = large();
    let sizes = [3 << 20, 8, 300_000, 262_144 - 40, 262_144, 100, 2 << 20, 1];
    for n in 0..sizes.len() {
        let mut log = Log::open(identity.clone(), start, &mut |_| Ok(())).unwrap();
        append(&mut log, &vec![n as u8 + 1; sizes[n]]);
        drop(log);
        assert_eq!(lengths(&identity, start).unwrap(), sizes[..=n]);
    }
}

#[test]
fn a_new_segment_is_allocated_and_zeros_run_ahead_of_the_end() {
    let (dir, identity, start) = large();
    let probe = std::fs::File::create(dir.path().join("probe")).unwrap();
    if !sync_shim::allocate(&probe, LARGE).unwrap() {
        return; // then all of it is written
    }
    let file = std::fs::File::open(segment::path(&identity.dir, 1)).unwrap();
    let filled = || sync_shim::next_hole(&file, 0).unwrap();
    assert_eq!(filled(), segment::FILL);
    let mut log = Log::open(identity.clone(), start, &mut |_| Ok(())).unwrap();
    let mut sizes = Vec::new();
    while log.place().position % LARGE < LARGE - (200 << 10) {
        sizes.push(150_000);
        append(&mut log, &vec![7; 150_000]);
        // What was read of a hole looks filled too.
        let ahead = (log.place().position - LARGE).next_multiple_of(segment::FILL);
        assert!((ahead..=ahead + segment::FILL).contains(&filled()));
        if sizes.len() % 5 == 0 {
            drop(log);
            assert_eq!(lengths(&identity, start).unwrap(), sizes);
            log = Log::open(identity.clone(), start, &mut |_| Ok(())).unwrap();
        }
    }
    drop(log);
    assert_eq!(lengths(&identity, start).unwrap(), sizes);
}

#[test]
fn a_hole_before_a_later_entry_is_refused() {
    let (_dir, identity, start) = large();
    let mut log = Log::open(identity.clone(), start, &mut |_| Ok(())).unwrap();
    let places: Vec<_> = (0..5)
        .map(|_| append(&mut log, &vec![9; 600_000]).position)
        .collect();
    drop(log);
    let path = segment::path(&identity.dir, 1);
    let whole = std::fs::read(&path).unwrap();
    let file = std::fs::File::options().write(true).open(&path).unwrap();
    let last = places[3] - LARGE;
    let first = places[0] - LARGE;
    for (from, to, refused) in [
        (8_192, last - 8_192, true),
        (8_192, last, true),
        (0, first, true),
        (8_192, LARGE, false),
        (last, LARGE, false),
    ] {
        if !sync_shim::punch_hole(&file, from, to - from).unwrap() {
            return; // no holes here
        }
        let result = lengths(&identity, start);
        assert_eq!(is_corrupt(&result), refused, "{from}..{to}: {result:?}");
        std::fs::write(&path, &whole).unwrap();
    }
}

#[test]
fn the_search_finds_an_entry_wherever_it_begins() {
    let (_dir, identity, _) = large();
    let open = || Segment::open(&identity, 1).unwrap();
    let segment = open();
    let header = entry::Header {
        kind: Kind::Facts,
        length: 40 + 9,
        sequence: 6,
        now: Timestamp(1),
        wall: WallTime(2),
    };
    let (from, piece, block) = (SEGMENT_HEADER, 256 << 10, 4_096);
    let edges = [
        from,
        from + block,
        from + piece,
        from + 2 * piece,
        1 << 20,
        LARGE - 56,
    ];
    let starts = edges.iter().flat_map(|edge| {
        let first = edge.saturating_sub(64).max(from);
        (first..(edge + 64).min(LARGE - 55)).step_by(8)
    });
    let mut tried = 0;
    for noise in [0, 0xff, 1] {
        std::fs::write(&segment.path, vec![noise; LARGE as usize]).unwrap();
        segment
            .file
            .write_all_at(&segment::header(&identity, 1), 0)
            .unwrap();
        for start in starts.clone() {
            let mut bytes = vec![0; ENTRY_HEADER];
            bytes.extend_from_slice(b"nine byte");
            let position = LARGE + start;
            entry::finish(&mut bytes, &header, &identity.store_id, position);
            segment.file.write_all_at(&bytes, start).unwrap();
            let found = |after, from| {
                let found = reading::search(&identity, &segment, from, after).unwrap();
                found.map(|(at, header)| (at, header.sequence))
            };
            assert_eq!(found(5, from), Some((position, 6)), "{start} in {noise:x}");
            assert_eq!(found(5, start), Some((position, 6)));
            assert_eq!(found(6, from), None, "not a later one");
            assert_eq!(found(5, start + 8), None, "it begins before");
            bytes[44] ^= 1;
            segment.file.write_all_at(&bytes, start).unwrap();
            assert_eq!(found(5, from), None, "not whole");
            bytes.fill(noise);
            segment.file.write_all_at(&bytes, start).unwrap();
            tried += 1;
        }
    }
    assert!(tried > 200, "only {tried}");
}

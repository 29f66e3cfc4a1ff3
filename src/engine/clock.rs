//! The only place that reads clocks.
//!
//! Knows nothing of the broker: it turns what was persisted and what the machine says into the two times that a turn brings.
//! Invariant (G6): the broker's `now` never goes back, and no jump of the calendar moves it, except that a start adds the
//! measured downtime, at most a day.

use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use crate::broker::types::{Timestamp, WallTime};

/// The longest downtime that is believed, in milliseconds: a broken calendar must not expire everything at once.
pub const MAX_DOWNTIME_MS: u64 = 24 * 60 * 60 * 1_000;

/// Calendar time, from the machine. Before 1970 reads as 1970.
#[must_use]
pub fn wall_now() -> WallTime {
    #[expect(
        clippy::disallowed_methods,
        reason = "this is the one place that reads the calendar"
    )]
    let now = SystemTime::now();
    let since = now.duration_since(UNIX_EPOCH).unwrap_or(Duration::ZERO);
    WallTime(u64::try_from(since.as_millis()).unwrap_or(u64::MAX))
}

/// Measures how long something took.
#[derive(Debug, Clone, Copy)]
pub struct Stopwatch(Instant);

impl Stopwatch {
    /// Begins to measure.
    #[must_use]
    pub fn start() -> Self {
        #[expect(
            clippy::disallowed_methods,
            reason = "this is the one place that reads the boot clock"
        )]
        let now = Instant::now();
        Self(now)
    }

    /// Time since the start.
    #[must_use]
    pub fn elapsed(&self) -> Duration {
        self.0.elapsed()
    }

    /// Whole milliseconds since the start.
    #[must_use]
    pub fn elapsed_ms(&self) -> u64 {
        u64::try_from(self.0.elapsed().as_millis()).unwrap_or(u64::MAX)
    }
}

/// The broker's own time: what was persisted, and the time that has passed since.
#[derive(Debug, Clone, Copy)]
pub struct BootClock {
    base: Timestamp,
    since: Stopwatch,
}

impl BootClock {
    /// A clock that reads `base` now.
    #[must_use]
    pub fn starting_at(base: Timestamp) -> Self {
        Self {
            base,
            since: Stopwatch::start(),
        }
    }

    /// The broker's time.
    #[must_use]
    pub fn now(&self) -> Timestamp {
        self.base.after_ms(self.since.elapsed_ms())
    }
}

/// The broker's time at a start: what the store remembers plus the measured downtime (G6). `last_wall` is 0 for a new store.
#[must_use]
pub fn time_at_start(persisted: Timestamp, last_wall: WallTime, wall: WallTime) -> Timestamp {
    if last_wall.0 == 0 {
        return persisted;
    }
    persisted.after_ms(wall.0.saturating_sub(last_wall.0).min(MAX_DOWNTIME_MS))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_start_adds_the_measured_downtime_within_a_day() {
        let day = MAX_DOWNTIME_MS;
        for (name, persisted, last_wall, wall, expected) in [
            ("a new store begins where it is", 0, 0, 1_700_000_000_000, 0),
            ("a minute down", 500, 1_000_000, 1_060_000, 60_500),
            ("no downtime", 500, 1_000_000, 1_000_000, 500),
            ("the calendar went back", 500, 1_000_000, 10, 500),
            (
                "a month down counts as a day",
                500,
                1,
                1 + 31 * day,
                500 + day,
            ),
            ("exactly a day", 0, 1, 1 + day, day),
            ("no overflow", u64::MAX - 1, 1, 1 + day, u64::MAX),
        ] {
            assert_eq!(
                time_at_start(Timestamp(persisted), WallTime(last_wall), WallTime(wall)),
                Timestamp(expected),
                "{name}"
            );
        }
    }

    #[test]
    fn the_boot_clock_begins_at_its_base_and_does_not_go_back() {
        let clock = BootClock::starting_at(Timestamp(7_000));
        let first = clock.now();
        assert!(first >= Timestamp(7_000), "it begins at its base");
        assert!(first < Timestamp(67_000), "and not far from it");
        let mut last = first;
        for _ in 0..1_000 {
            let now = clock.now();
            assert!(now >= last, "G6 never back");
            last = now;
        }
    }

    #[test]
    fn the_calendar_is_later_than_this_code() {
        assert!(wall_now() > WallTime(1_700_000_000_000));
    }
}

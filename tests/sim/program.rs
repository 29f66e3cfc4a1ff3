//! Random programs whose calls become graphs, and what they must give, computed without a broker.
//!
//! Values flow as numbers. A call's number is a hash of its id and of the numbers it received, so a wrong, missing, doubled or swapped
//! input changes the result of the run.

use bytes::Bytes;
use dagorama::broker::command::{Delay, NewInput, NewNode, NodeRef};
use dagorama::broker::types::{Body, Codec, InputUse, Payload};

use crate::rng::{Rng, fold};

/// What an edge that accepts failure passes on when there was one.
pub const FAILED: u64 = 0xdead;

/// What a call's body does.
#[derive(Debug, Clone)]
pub enum Does {
    /// Returns its own number.
    Returns,
    /// Raises, always.
    Raises,
    /// Makes children, in this order, and ends as said.
    Spawns {
        children: Vec<usize>,
        end: End,
        /// Creates them before it ends, not with its end.
        flush: bool,
    },
}

/// How a body that made children ends. Numbers are positions among its children.
#[derive(Debug, Clone)]
pub enum End {
    Own,
    Structure(Vec<usize>),
    Tail(usize),
}

/// A call of a program.
#[derive(Debug, Clone)]
pub struct Call {
    pub does: Does,
    /// Raises this often before it does what it does.
    pub flaky: u32,
    /// Earlier siblings.
    pub inputs: Vec<(usize, InputUse)>,
    pub delay_ms: u64,
    /// Index into the simulator's specs.
    pub spec: u32,
}

/// A program: all its calls, those of the submission, and which of them is the root.
#[derive(Debug, Clone)]
pub struct Program {
    pub calls: Vec<Call>,
    pub top: Vec<usize>,
    pub root: usize,
}

/// The simulator's specs, by what they are for.
pub const SPEC_FLAKY: u32 = 1;
pub const SPECS: u64 = 5;

impl Program {
    pub fn random(rng: &mut Rng) -> Self {
        let mut program = Self {
            calls: Vec::new(),
            top: Vec::new(),
            root: 0,
        };
        let (n, depth) = (rng.range(1, 4), rng.range(0, 3));
        program.top = program.siblings(rng, n, depth as u32);
        program.root = rng.below(n) as usize;
        if rng.percent(70) {
            program.root = n as usize - 1;
        }
        program
    }

    fn siblings(&mut self, rng: &mut Rng, n: u64, depth: u32) -> Vec<usize> {
        let mut list = Vec::new();
        for position in 0..n {
            let call = self.call(rng, position, depth);
            self.calls.push(call);
            list.push(self.calls.len() - 1);
        }
        list
    }

    fn call(&mut self, rng: &mut Rng, position: u64, depth: u32) -> Call {
        let mut inputs = Vec::new();
        if position > 0 {
            if rng.percent(10) {
                // A join of everything before it: one range.
                let mode = [InputUse::Value, InputUse::Outcome][rng.below(2) as usize];
                inputs = (0..position as usize).map(|at| (at, mode)).collect();
            } else {
                for _ in 0..rng.below(3) {
                    let mode = match rng.below(10) {
                        0..=5 => InputUse::Value,
                        6..=8 => InputUse::Outcome,
                        _ => InputUse::After,
                    };
                    let input = (rng.below(position) as usize, mode);
                    if inputs.iter().all(|(at, _)| *at != input.0) {
                        inputs.push(input);
                    }
                }
            }
        }
        let does = if depth > 0 && rng.percent(60) {
            let n = if rng.percent(5) {
                rng.range(20, 60)
            } else {
                rng.range(1, 5)
            };
            let children = self.siblings(rng, n, if n > 5 { 0 } else { depth - 1 });
            let end = match rng.below(3) {
                0 => End::Own,
                1 => End::Structure(
                    (0..rng.range(1, 3))
                        .map(|_| rng.below(n) as usize)
                        .collect(),
                ),
                _ => End::Tail(rng.below(n) as usize),
            };
            Does::Spawns {
                children,
                end,
                flush: rng.percent(25),
            }
        } else if rng.percent(6) {
            Does::Raises
        } else {
            Does::Returns
        };
        let flaky = if rng.percent(12) {
            rng.range(1, 3) as u32
        } else {
            0
        };
        Call {
            does,
            flaky,
            inputs,
            delay_ms: if rng.percent(8) { rng.range(1, 900) } else { 0 },
            spec: if flaky > 0 {
                SPEC_FLAKY
            } else {
                rng.below(SPECS) as u32
            },
        }
    }

    /// The value of the run, `None` if it does not succeed.
    pub fn expected(&self) -> Option<u64> {
        self.values(&self.top)[self.root]
    }

    fn values(&self, siblings: &[usize]) -> Vec<Option<u64>> {
        let mut values: Vec<Option<u64>> = Vec::new();
        for id in siblings {
            let call = &self.calls[*id];
            let skipped = (call.inputs.iter())
                .any(|(at, mode)| *mode != InputUse::Outcome && values[*at].is_none());
            let received = (call.inputs.iter())
                .filter(|(_, mode)| *mode != InputUse::After)
                .map(|(at, _)| values[*at].unwrap_or(FAILED));
            let received: Vec<u64> = received.collect();
            values.push(if skipped {
                None
            } else {
                self.value(*id, &received)
            });
        }
        values
    }

    fn value(&self, id: usize, received: &[u64]) -> Option<u64> {
        match &self.calls[id].does {
            Does::Returns => Some(own_value(id, received)),
            Does::Raises => None,
            Does::Spawns { children, end, .. } => {
                let values = self.values(children);
                match end {
                    End::Own => Some(own_value(id, received)),
                    End::Tail(at) => values[*at],
                    End::Structure(refs) => {
                        let parts: Option<Vec<u64>> = refs.iter().map(|at| values[*at]).collect();
                        parts.map(|parts| structure_value(id as u64, &parts))
                    }
                }
            }
        }
    }

    /// Siblings as the broker takes them.
    pub fn new_nodes(&self, program: u64, siblings: &[usize]) -> Vec<NewNode> {
        siblings
            .iter()
            .map(|id| {
                let call = &self.calls[*id];
                let mut inputs: Vec<NewInput> = Vec::new();
                for (at, mode) in &call.inputs {
                    match inputs.last_mut() {
                        Some(NewInput {
                            first: NodeRef::New(first),
                            count,
                            mode: last,
                        }) if *first + *count == *at as u32 && last == mode => *count += 1,
                        _ => inputs.push(NewInput {
                            first: NodeRef::New(*at as u32),
                            count: 1,
                            mode: *mode,
                        }),
                    }
                }
                NewNode {
                    spec: call.spec,
                    arguments: Left::Call {
                        program,
                        id: *id as u64,
                    }
                    .payload(),
                    inputs,
                    delay: match call.delay_ms {
                        0 => Delay::None,
                        ms => Delay::For(ms),
                    },
                }
            })
            .collect()
    }
}

/// The number of a call that returns by itself.
pub fn own_value(id: usize, received: &[u64]) -> u64 {
    fold([1, id as u64].into_iter().chain(received.iter().copied()))
}

/// The number of a structure, from the numbers of what it refers to.
pub fn structure_value(id: u64, parts: &[u64]) -> u64 {
    fold([2, id].into_iter().chain(parts.iter().copied()))
}

/// What the payloads of the simulation say.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Left {
    /// Arguments: which call of which program.
    Call { program: u64, id: u64 },
    /// A value, and which attempt left it.
    Value { value: u64, attempt: u64 },
    /// A structure of that call, and which attempt left it.
    Structure { id: u64, attempt: u64 },
    /// An error, and which attempt left it.
    Error { id: u64, attempt: u64 },
}

impl Left {
    pub fn payload(self) -> Payload {
        let (tag, first, second) = match self {
            Self::Call { program, id } => (0u8, program, id),
            Self::Value { value, attempt } => (1, value, attempt),
            Self::Structure { id, attempt } => (2, id, attempt),
            Self::Error { id, attempt } => (3, id, attempt),
        };
        let mut bytes = vec![tag];
        bytes.extend(first.to_le_bytes());
        bytes.extend(second.to_le_bytes());
        Payload {
            codec: Codec::Raw,
            body: Body::Inline(Bytes::from(bytes)),
        }
    }

    pub fn read(payload: &Payload) -> Option<Self> {
        let Body::Inline(bytes) = &payload.body else {
            return None;
        };
        let (tag, numbers) = bytes.split_first()?;
        if numbers.len() != 16 {
            return None;
        }
        let number = |at: usize| Some(u64::from_le_bytes(numbers[at..at + 8].try_into().ok()?));
        let (first, second) = (number(0)?, number(8)?);
        Some(match tag {
            0 => Self::Call {
                program: first,
                id: second,
            },
            1 => Self::Value {
                value: first,
                attempt: second,
            },
            2 => Self::Structure {
                id: first,
                attempt: second,
            },
            3 => Self::Error {
                id: first,
                attempt: second,
            },
            _ => return None,
        })
    }
}

#[test]
fn the_evaluator_knows_skips_outcomes_tails_and_structures() {
    let call = |does, inputs: &[(usize, InputUse)]| Call {
        does,
        flaky: 0,
        inputs: inputs.to_vec(),
        delay_ms: 0,
        spec: 0,
    };
    let spawn = |children: &[usize], end| Does::Spawns {
        children: children.to_vec(),
        end,
        flush: false,
    };
    let program = Program {
        calls: vec![
            call(Does::Raises, &[]),
            call(Does::Returns, &[(0, InputUse::Value)]),
            call(Does::Returns, &[(0, InputUse::Outcome)]),
            call(spawn(&[5, 6], End::Tail(1)), &[]),
            call(spawn(&[5, 6], End::Structure(vec![1, 0, 1])), &[]),
            call(Does::Returns, &[]),
            call(Does::Returns, &[(0, InputUse::Value)]),
            call(spawn(&[0], End::Tail(0)), &[]),
            call(spawn(&[0], End::Own), &[(3, InputUse::After)]),
        ],
        top: vec![0, 1, 2, 3, 4, 7, 8],
        root: 0,
    };
    let five = own_value(5, &[]);
    let six = own_value(6, &[five]);
    let expected = [
        None,
        None,
        Some(own_value(2, &[FAILED])),
        Some(six),
        Some(structure_value(4, &[six, five, six])),
        None,
        Some(own_value(8, &[])),
    ];
    assert_eq!(program.values(&program.top), expected);
}

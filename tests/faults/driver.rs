//! An independent client and worker: plain blocking sockets, written from `docs/PROTOCOL.md` alone, sharing no code with the product.
//!
//! It keeps the journal that the suites judge by: what was acknowledged to it, and where the recorded trace stood when that arrived.
//! All values are functions of the run's seed, so a wrong answer is recognised without asking anybody.

use std::collections::BTreeMap;
use std::io::{self, Read, Write};
use std::net::TcpStream;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use serde_json::{Value, json};

const HELLO: u8 = 1;
const DEFINE: u8 = 2;
const SUBMIT: u8 = 3;
const CREDIT: u8 = 4;
const FINISH: u8 = 5;
const FETCH: u8 = 7;
const WAIT: u8 = 8;
const CANCEL: u8 = 10;
const RESUME: u8 = 11;
const REPLY: u8 = 128;
const ERROR: u8 = 129;
const SPECS: u8 = 130;
const LEASES: u8 = 131;

/// The actions, by the number under which every connection defines them.
const ACTIONS: [&str; 4] = ["faults.fan", "faults.leaf", "faults.join", "faults.flaky"];

/// What was acknowledged.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Ack {
    /// A run is durable.
    Submitted { seq: u64, salt: u64, plan: Plan },
    /// An outcome is durable: bytes of a value; `None` for a tail call or a failure that is retried.
    Finished {
        seq: u64,
        node: u32,
        attempt: u32,
        value: Option<Vec<u8>>,
    },
    /// A run is cancelled.
    Cancelled { seq: u64 },
    /// A run is resumed.
    Resumed { seq: u64 },
}

/// What a run is to do: its arguments on the wire, 16 bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Plan {
    /// Decides every value.
    pub seed: u64,
    /// Leaves of a fan; 0: the run is a single leaf.
    pub width: u32,
    /// Large bodies now and then.
    pub large: bool,
}

impl Plan {
    fn encode(self, index: u32) -> Vec<u8> {
        let mut bytes = self.seed.to_le_bytes().to_vec();
        bytes.extend((self.width | u32::from(self.large) << 31).to_le_bytes());
        bytes.extend(index.to_le_bytes());
        bytes
    }

    /// Plan and leaf number from the arguments of a node.
    pub(crate) fn decode(bytes: &[u8]) -> Option<(Self, u32)> {
        let seed = u64::from_le_bytes(bytes.get(..8)?.try_into().ok()?);
        let width = u32::from_le_bytes(bytes.get(8..12)?.try_into().ok()?);
        let index = u32::from_le_bytes(bytes.get(12..16)?.try_into().ok()?);
        Some((
            Self {
                seed,
                width: width & 0x7fff_ffff,
                large: width >> 31 == 1,
            },
            index,
        ))
    }

    /// The value of leaf `index`.
    pub(crate) fn leaf(self, index: u32) -> Vec<u8> {
        let hash = mix(self.seed ^ (u64::from(index) << 32 | 1));
        let length = if self.large && hash.is_multiple_of(11) {
            3_500 + (hash >> 8) as usize % 30_000
        } else {
            8
        };
        let mut value = Vec::with_capacity(length + 8);
        let mut state = hash;
        while value.len() < length {
            value.extend(state.to_le_bytes());
            state = mix(state);
        }
        value.truncate(length);
        value
    }

    /// The value of the run: of its leaf, or the hash of all leaves in order.
    pub(crate) fn value(self) -> Vec<u8> {
        if self.width == 0 {
            return self.leaf(0);
        }
        join((0..self.width).map(|index| self.leaf(index)))
    }
}

fn join(leaves: impl Iterator<Item = Vec<u8>>) -> Vec<u8> {
    let mut hash = 0x1234_5678_u64;
    for leaf in leaves {
        for chunk in leaf.chunks(8) {
            let mut bytes = [0u8; 8];
            bytes[..chunk.len()].copy_from_slice(chunk);
            hash = mix(hash ^ u64::from_le_bytes(bytes));
        }
    }
    hash.to_le_bytes().to_vec()
}

fn mix(x: u64) -> u64 {
    let mut z = x.wrapping_add(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// The journal of all connections.
#[derive(Debug, Default)]
pub(crate) struct Journal {
    /// Acknowledgements, each with the length of the trace when it had arrived.
    pub acks: Mutex<Vec<(u64, Ack)>>,
    /// All plans that were ever sent, by submission key: a run that is none of them was invented.
    pub sent: Mutex<BTreeMap<u64, Plan>>,
    /// Values that a join read and that were not what their leaf had returned.
    pub wrong_reads: AtomicU64,
    /// Outcomes sent and not answered yet.
    pub in_flight: AtomicU64,
    /// Set to end the threads.
    pub stop: AtomicBool,
    /// The trace whose length is noted.
    pub trace: Option<PathBuf>,
}

impl Journal {
    fn ack(&self, ack: Ack) {
        let position = self
            .trace
            .as_ref()
            .and_then(|path| std::fs::metadata(path).ok())
            .map_or(0, |about| about.len());
        self.acks.lock().expect("journal").push((position, ack));
    }

    /// Nodes of which outcomes of two different attempts with a value were acknowledged.
    pub(crate) fn applied_twice(&self) -> u64 {
        let mut first: BTreeMap<(u64, u32), u32> = BTreeMap::new();
        let mut twice = 0;
        for (_, ack) in self.acks.lock().expect("journal").iter() {
            if let Ack::Finished {
                seq,
                node,
                attempt,
                value: Some(_),
            } = ack
                && *first.entry((*seq, *node)).or_insert(*attempt) != *attempt
            {
                twice += 1;
            }
        }
        twice
    }
}

/// One connection.
pub(crate) struct Link {
    stream: TcpStream,
    next_request: u32,
}

/// A frame that came in.
pub(crate) struct Frame {
    verb: u8,
    more: bool,
    request: u32,
    body: Vec<u8>,
}

impl Link {
    /// Connects and says hello.
    pub(crate) fn connect(url: &str, hello: &Value) -> io::Result<(Self, Value)> {
        let address = url.trim_start_matches("dagorama://");
        let stream = TcpStream::connect(address)?;
        stream.set_nodelay(true)?;
        let mut link = Self {
            stream,
            next_request: 1,
        };
        let mut body = json!({"version": 1, "token": super::TOKEN, "name": "faults"});
        for (key, value) in hello.as_object().expect("an object") {
            body[key] = value.clone();
        }
        let reply = link.call(HELLO, body.to_string().as_bytes())?;
        Ok((
            link,
            serde_json::from_slice(&reply).map_err(io::Error::other)?,
        ))
    }

    fn specs() -> Value {
        Value::Array(
            ACTIONS
                .iter()
                .enumerate()
                .map(|(id, action)| json!({"id": id, "action": action, "retry": {"max_attempts": 3, "max_losses": 1000, "delay_ms": 1, "factor_milli": 1000, "max_delay_ms": 5, "jitter_milli": 0}}))
                .collect(),
        )
    }

    fn send(&mut self, verb: u8, request: u32, body: &[u8]) -> io::Result<()> {
        let mut frame = Vec::with_capacity(12 + body.len());
        frame.extend((body.len() as u32).to_le_bytes());
        frame.extend([verb, 0, 0, 0]);
        frame.extend(request.to_le_bytes());
        frame.extend(body);
        self.stream.write_all(&frame)
    }

    fn receive(&mut self) -> io::Result<Frame> {
        let mut head = [0u8; 12];
        self.stream.read_exact(&mut head)?;
        let mut body = vec![0; u32::from_le_bytes(head[..4].try_into().expect("4 bytes")) as usize];
        self.stream.read_exact(&mut body)?;
        Ok(Frame {
            verb: head[4],
            more: head[5] & 1 == 1,
            request: u32::from_le_bytes(head[8..].try_into().expect("4 bytes")),
            body,
        })
    }

    fn request(&mut self) -> u32 {
        self.next_request += 1;
        self.next_request
    }

    /// Sends a request on a connection that has no other and waits for the whole reply.
    pub(crate) fn call(&mut self, verb: u8, body: &[u8]) -> io::Result<Vec<u8>> {
        let request = self.request();
        self.send(verb, request, body)?;
        let mut all = Vec::new();
        loop {
            let frame = self.receive()?;
            match frame.verb {
                REPLY if frame.request == request => {
                    all.extend(frame.body);
                    if !frame.more {
                        return Ok(all);
                    }
                }
                ERROR => {
                    return Err(io::Error::other(
                        String::from_utf8_lossy(&frame.body).into_owned(),
                    ));
                }
                _ => return Err(io::Error::other(format!("unexpected verb {}", frame.verb))),
            }
        }
    }
}

/// A reader of little-endian bodies.
struct Cursor<'a>(&'a [u8]);

impl<'a> Cursor<'a> {
    fn bytes(&mut self, n: usize) -> io::Result<&'a [u8]> {
        if self.0.len() < n {
            return Err(io::Error::other("body too short"));
        }
        let (head, rest) = self.0.split_at(n);
        self.0 = rest;
        Ok(head)
    }
    fn u8(&mut self) -> io::Result<u8> {
        Ok(self.bytes(1)?[0])
    }
    fn u16(&mut self) -> io::Result<u16> {
        Ok(u16::from_le_bytes(
            self.bytes(2)?.try_into().expect("2 bytes"),
        ))
    }
    fn u32(&mut self) -> io::Result<u32> {
        Ok(u32::from_le_bytes(
            self.bytes(4)?.try_into().expect("4 bytes"),
        ))
    }
    fn u64(&mut self) -> io::Result<u64> {
        Ok(u64::from_le_bytes(
            self.bytes(8)?.try_into().expect("8 bytes"),
        ))
    }
}

fn node(spec: u32, ranges: &[[u32; 3]], arguments: &[u8], delay_ms: u64) -> Vec<u8> {
    let mut out = spec.to_le_bytes().to_vec();
    out.extend([3, u8::from(delay_ms > 0), 0, 0]); // raw bytes, after so many milliseconds
    out.extend((ranges.len() as u32).to_le_bytes());
    out.extend((arguments.len() as u32).to_le_bytes());
    out.extend(delay_ms.to_le_bytes());
    for word in ranges.iter().flatten() {
        out.extend(word.to_le_bytes());
    }
    out.extend(arguments);
    out
}

/// Submits runs one batch after another until told to stop or an error; they start after `delay_ms`. The submission key is the plan's seed.
pub(crate) fn submit(
    url: &str,
    journal: &Journal,
    plans: impl Iterator<Item = Plan>,
    batch: usize,
    delay_ms: u64,
) -> io::Result<()> {
    let (mut link, _) = Link::connect(url, &json!({"kind": "client"}))?;
    link.send(DEFINE, 0, Link::specs().to_string().as_bytes())?;
    let mut plans = plans.peekable();
    while plans.peek().is_some() && !journal.stop.load(Ordering::Relaxed) {
        let group: Vec<Plan> = plans.by_ref().take(batch).collect();
        let mut body = (group.len() as u32).to_le_bytes().to_vec();
        for plan in &group {
            journal
                .sent
                .lock()
                .expect("journal")
                .insert(plan.seed, *plan);
            let key = plan.seed.to_le_bytes();
            body.extend((key.len() as u16).to_le_bytes());
            body.extend(key);
            body.extend(0u16.to_le_bytes());
            body.extend(1u32.to_le_bytes());
            body.extend(0u32.to_le_bytes());
            body.extend(node(
                u32::from(plan.width == 0),
                &[],
                &plan.encode(0),
                delay_ms,
            ));
        }
        let reply = link.call(SUBMIT, &body)?;
        let mut reply = Cursor(&reply);
        let n = reply.u32()? as usize;
        for plan in &group[..n] {
            if reply.u8()? == 0 {
                let length = reply.u16()?.into();
                return Err(io::Error::other(
                    String::from_utf8_lossy(reply.bytes(length)?).into_owned(),
                ));
            }
            let (seq, salt) = (reply.u64()?, reply.u64()?);
            journal.ack(Ack::Submitted {
                seq,
                salt,
                plan: *plan,
            });
        }
    }
    Ok(())
}

/// Cancels a run, or resumes it.
pub(crate) fn turn(
    url: &str,
    journal: &Journal,
    seq: u64,
    salt: u64,
    resume: bool,
) -> io::Result<()> {
    let (mut link, _) = Link::connect(url, &json!({"kind": "client"}))?;
    let run = format!("{seq:x}-{salt:016x}");
    if resume {
        link.call(RESUME, json!({"run": run}).to_string().as_bytes())?;
        journal.ack(Ack::Resumed { seq });
    } else {
        link.call(
            CANCEL,
            json!({"run": run, "reason": "test"}).to_string().as_bytes(),
        )?;
        journal.ack(Ack::Cancelled { seq });
    }
    Ok(())
}

/// The state (as PROTOCOL §9) and the value of a run, waiting at most that long.
pub(crate) fn wait(
    url: &str,
    seq: u64,
    salt: u64,
    patience: Duration,
) -> io::Result<(u8, Vec<u8>)> {
    let (mut link, _) = Link::connect(url, &json!({"kind": "client"}))?;
    let mut body = seq.to_le_bytes().to_vec();
    body.extend(salt.to_le_bytes());
    body.extend((patience.as_millis() as u32).to_le_bytes());
    let reply = link.call(WAIT, &body)?;
    let mut reply = Cursor(&reply);
    let state = reply.u8()?;
    let hint = reply.u16()?.into();
    reply.bytes(hint)?;
    if state < 5 {
        return Ok((state, Vec::new()));
    }
    Ok((state, item(&mut reply)?.1))
}

fn item(cursor: &mut Cursor<'_>) -> io::Result<(u8, Vec<u8>)> {
    cursor.u32()?;
    let state = cursor.u8()?;
    cursor.bytes(3)?;
    let (ranges, length) = (cursor.u32()? as usize, cursor.u32()? as usize);
    cursor.bytes(12 * ranges)?;
    Ok((state, cursor.bytes(length)?.to_vec()))
}

struct LeaseItem {
    seq: u64,
    node: u32,
    attempt: u32,
    token: [u8; 16],
    action: String,
    ranges: Vec<[u32; 3]>,
    arguments: Vec<u8>,
}

/// What a worker takes from one connection to the next.
#[derive(Debug, Default)]
pub(crate) struct Seat {
    session: Option<String>,
    /// Frames that were not answered, with what their answers will mean; they are repeated.
    unanswered: BTreeMap<u32, (Vec<u8>, Vec<Ack>)>,
    next_request: u32,
}

/// Works until told to stop or the connection breaks.
pub(crate) fn work(url: &str, journal: &Journal, seat: &mut Seat, credit: u32) -> io::Result<()> {
    let actions = Link::specs();
    let (mut link, welcome) = Link::connect(
        url,
        &json!({"kind": "worker", "session": seat.session, "queues": ["default"], "tolerate": [], "actions": actions}),
    )?;
    seat.session = welcome["session"].as_str().map(str::to_owned);
    link.next_request = link.next_request.max(seat.next_request);
    link.stream
        .set_read_timeout(Some(Duration::from_millis(100)))?;
    link.send(DEFINE, 0, Link::specs().to_string().as_bytes())?;
    let mut known = std::collections::BTreeSet::new();
    for (request, (body, acks)) in &seat.unanswered {
        link.send(FINISH, *request, body)?;
        known.extend(acks.iter().filter_map(|ack| {
            if let Ack::Finished { seq, node, .. } = ack {
                Some((*seq, u64::from(*node)))
            } else {
                None
            }
        }));
    }
    for lease in welcome["leases"].as_array().into_iter().flatten() {
        let (seq, node, attempt) = (number(&lease[0]), number(&lease[1]), number(&lease[2]));
        if !known.contains(&(seq, node)) {
            // Pushed, but it never arrived, or its outcome was never sent: given back.
            let mut body = 1u32.to_le_bytes().to_vec();
            body.extend(seq.to_le_bytes());
            body.extend((node as u32).to_le_bytes());
            body.extend((attempt as u32).to_le_bytes());
            body.extend([0; 16]);
            body.extend([5, 3, 0, 0]);
            body.extend([0; 12]);
            let request = link.request();
            link.send(FINISH, request, &body)?;
            seat.unanswered.insert(request, (body, Vec::new()));
        }
    }
    link.send(CREDIT, 0, &credit.to_le_bytes())?;
    let mut names: BTreeMap<u32, String> = BTreeMap::new();
    let mut later: Vec<Frame> = Vec::new();
    while !journal.stop.load(Ordering::Relaxed) {
        let next = later
            .pop()
            .map_or_else(|| link.receive_or_idle(), |frame| Ok(Some(frame)))?;
        let Some(frame) = next else {
            link.send(6, 0, &0u32.to_le_bytes())?; // heartbeat
            continue;
        };
        match frame.verb {
            SPECS => {
                let specs: Value = serde_json::from_slice(&frame.body).map_err(io::Error::other)?;
                for spec in specs.as_array().into_iter().flatten() {
                    names.insert(
                        spec["id"].as_u64().unwrap_or_default() as u32,
                        spec["action"].as_str().unwrap_or_default().to_owned(),
                    );
                }
            }
            LEASES => {
                let leases = leases(&frame.body, &names)?;
                let n = leases.len() as u32;
                let mut body = n.to_le_bytes().to_vec();
                let mut acks = Vec::new();
                for lease in leases {
                    let (bytes, ack) = run(&mut link, &lease, journal, &mut later)?;
                    body.extend(bytes);
                    acks.push(ack);
                }
                let request = link.request();
                seat.next_request = link.next_request;
                journal
                    .in_flight
                    .fetch_add(acks.len() as u64, Ordering::Relaxed);
                seat.unanswered.insert(request, (body.clone(), acks));
                link.send(FINISH, request, &body)?;
                link.send(CREDIT, 0, &n.to_le_bytes())?;
            }
            REPLY => {
                let (_, mut acks) = seat
                    .unanswered
                    .remove(&frame.request)
                    .ok_or_else(|| io::Error::other("a reply to nothing"))?;
                journal
                    .in_flight
                    .fetch_sub(acks.len() as u64, Ordering::Relaxed);
                let mut cursor = Cursor(&frame.body);
                let mut refused = Vec::new();
                for _ in 0..cursor.u32()? {
                    refused.push(cursor.u32()? as usize);
                    let length = cursor.u16()?.into();
                    cursor.bytes(length)?;
                }
                for at in refused
                    .into_iter()
                    .rev()
                    .filter(|at| *at < acks.len())
                    .collect::<Vec<_>>()
                {
                    acks.remove(at);
                }
                for ack in acks {
                    journal.ack(ack);
                }
            }
            ERROR => {
                return Err(io::Error::other(
                    String::from_utf8_lossy(&frame.body).into_owned(),
                ));
            }
            _ => {} // revocations: the outcome will be refused
        }
    }
    Ok(())
}

fn number(value: &Value) -> u64 {
    value.as_u64().unwrap_or_else(|| {
        value
            .as_str()
            .and_then(|text| u64::from_str_radix(text, 16).ok())
            .unwrap_or_default()
    })
}

impl Link {
    /// A frame, or nothing when none has begun to arrive within the read timeout.
    fn receive_or_idle(&mut self) -> io::Result<Option<Frame>> {
        let mut one = [0u8; 1];
        match self.stream.peek(&mut one) {
            Ok(0) => Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(_) => {
                self.stream
                    .set_read_timeout(Some(Duration::from_secs(20)))?;
                let frame = self.receive();
                self.stream
                    .set_read_timeout(Some(Duration::from_millis(100)))?;
                frame.map(Some)
            }
            Err(error)
                if matches!(
                    error.kind(),
                    io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut
                ) =>
            {
                Ok(None)
            }
            Err(error) => Err(error),
        }
    }
}

fn leases(body: &[u8], names: &BTreeMap<u32, String>) -> io::Result<Vec<LeaseItem>> {
    let mut cursor = Cursor(body);
    let mut leases = Vec::new();
    for _ in 0..cursor.u32()? {
        let seq = cursor.u64()?;
        cursor.u64()?;
        let (node, attempt) = (cursor.u32()?, cursor.u32()?);
        let token: [u8; 16] = cursor.bytes(16)?.try_into().expect("16 bytes");
        let spec = cursor.u32()?;
        cursor.u32()?;
        cursor.bytes(4)?;
        let (n_ranges, length, n_inline) = (cursor.u32()?, cursor.u32()? as usize, cursor.u32()?);
        let mut ranges = Vec::new();
        for _ in 0..n_ranges {
            ranges.push([cursor.u32()?, cursor.u32()?, cursor.u32()?]);
        }
        let arguments = cursor.bytes(length)?.to_vec();
        for _ in 0..n_inline {
            item(&mut cursor)?;
        }
        let action = names
            .get(&spec)
            .cloned()
            .ok_or_else(|| io::Error::other("a lease before its spec"))?;
        leases.push(LeaseItem {
            seq,
            node,
            attempt,
            token,
            action,
            ranges,
            arguments,
        });
    }
    Ok(leases)
}

/// Carries out one lease: the bytes of its FINISH item, and what its acknowledgement will mean.
fn run(
    link: &mut Link,
    lease: &LeaseItem,
    journal: &Journal,
    later: &mut Vec<Frame>,
) -> io::Result<(Vec<u8>, Ack)> {
    let (plan, index) = Plan::decode(&lease.arguments)
        .ok_or_else(|| io::Error::other("arguments that nobody sent"))?;
    let mut children: Vec<Vec<u8>> = Vec::new();
    let mut ranges: Vec<[u32; 3]> = Vec::new();
    let (end, body) = match lease.action.as_str() {
        "faults.fan" => {
            for index in 0..plan.width {
                let spec = if mix(plan.seed ^ u64::from(index)).is_multiple_of(13) {
                    3
                } else {
                    1
                };
                children.push(node(spec, &[], &plan.encode(index), 0));
            }
            children.push(node(2, &[[0, plan.width, 1 << 31]], &plan.encode(0), 0));
            ranges.push([plan.width, 1, 1 << 31]);
            (2, Vec::new())
        }
        "faults.flaky" if lease.attempt == 1 => (
            4,
            br#"{"type": "faults.Flaky", "message": "not yet", "traceback": "", "pickle": null}"#
                .to_vec(),
        ),
        "faults.join" => {
            let leaves = fetch(link, lease, later)?;
            for (at, leaf) in leaves.iter().enumerate() {
                if *leaf != plan.leaf(at as u32) {
                    journal.wrong_reads.fetch_add(1, Ordering::Relaxed);
                }
            }
            (0, join(leaves.into_iter()))
        }
        _ => (0, plan.leaf(index)),
    };
    let mut out = lease.seq.to_le_bytes().to_vec();
    out.extend(lease.node.to_le_bytes());
    out.extend(lease.attempt.to_le_bytes());
    out.extend(lease.token);
    out.extend([end, if end == 4 { 0 } else { 3 }, 0, 0]);
    out.extend((ranges.len() as u32).to_le_bytes());
    out.extend((children.len() as u32).to_le_bytes());
    out.extend((body.len() as u32).to_le_bytes());
    for word in ranges.iter().flatten() {
        out.extend(word.to_le_bytes());
    }
    out.extend(&body);
    out.extend(children.concat());
    let value = (end == 0).then_some(body);
    Ok((
        out,
        Ack::Finished {
            seq: lease.seq,
            node: lease.node,
            attempt: lease.attempt,
            value,
        },
    ))
}

fn fetch(link: &mut Link, lease: &LeaseItem, later: &mut Vec<Frame>) -> io::Result<Vec<Vec<u8>>> {
    let mut body = lease.seq.to_le_bytes().to_vec();
    body.extend((lease.ranges.len() as u32).to_le_bytes());
    for word in lease.ranges.iter().flatten() {
        body.extend(word.to_le_bytes());
    }
    let request = link.request();
    link.send(FETCH, request, &body)?;
    let mut values = Vec::new();
    loop {
        link.stream
            .set_read_timeout(Some(Duration::from_secs(20)))?;
        let frame = link.receive()?;
        link.stream
            .set_read_timeout(Some(Duration::from_millis(100)))?;
        if frame.request != request || frame.verb != REPLY {
            later.insert(0, frame); // handled afterwards, in order of arrival
            continue;
        }
        let mut cursor = Cursor(&frame.body);
        for _ in 0..cursor.u32()? {
            let (state, bytes) = item(&mut cursor)?;
            if state != 5 {
                return Err(io::Error::other(format!("an input in state {state}")));
            }
            values.push(bytes);
        }
        if !frame.more {
            return Ok(values);
        }
    }
}

/// Starts a worker thread that reconnects until the journal's `stop`; `url` may change between connections.
pub(crate) fn keep_working(
    url: Arc<Mutex<String>>,
    journal: Arc<Journal>,
    credit: u32,
) -> std::thread::JoinHandle<()> {
    std::thread::spawn(move || {
        let mut seat = Seat::default();
        while !journal.stop.load(Ordering::Relaxed) {
            let now = url.lock().expect("url").clone();
            if work(&now, &journal, &mut seat, credit).is_err() {
                std::thread::sleep(Duration::from_millis(20));
            }
        }
    })
}

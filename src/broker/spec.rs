//! Interned specs and names: nodes and facts name them by number.
//!
//! A number is given once and never reused; what a number means never changes. The pointer cache in front of the table saves the
//! comparison of whole specs and has no influence on what is answered.

use std::collections::BTreeMap;
use std::sync::Arc;

use xxhash_rust::xxh3::Xxh3;

use super::World;
use super::command::{Code, Rejection};
use super::outcome::{Fact, Tx};
use super::types::{NameId, Spec, SpecId};

/// Pointers remembered: enough for the specs of a few connections.
const CACHE: usize = 256;

/// All specs ever used.
#[derive(Debug)]
pub(super) struct Specs {
    list: Vec<Entry>,
    by_value: BTreeMap<Arc<Spec>, SpecId>,
    cache: Vec<Option<(Arc<Spec>, SpecId)>>,
}

#[derive(Debug)]
struct Entry {
    spec: Arc<Spec>,
    /// Hash of the spec without the code's fingerprint.
    likeness: u64,
    /// Outputs that want its outcomes.
    deliveries: Vec<Delivery>,
}

/// One output that wants the outcomes of a spec.
#[derive(Debug, Clone)]
pub(super) struct Delivery {
    pub output: Arc<str>,
    pub succeeded: bool,
    pub failed: bool,
}

/// Names of routes and outputs.
#[derive(Debug, Default)]
pub(super) struct Names {
    by_id: BTreeMap<NameId, Arc<str>>,
    by_name: BTreeMap<Arc<str>, NameId>,
}

impl Default for Specs {
    fn default() -> Self {
        Self {
            list: Vec::new(),
            by_value: BTreeMap::new(),
            cache: vec![None; CACHE],
        }
    }
}

fn slot(spec: &Arc<Spec>) -> usize {
    (Arc::as_ptr(spec) as usize >> 4) % CACHE
}

impl Specs {
    pub(super) fn get(&self, id: SpecId) -> Option<&Arc<Spec>> {
        self.list.get(id.0 as usize).map(|entry| &entry.spec)
    }

    /// A spec that a node names.
    pub(super) fn of(&self, id: u32) -> &Arc<Spec> {
        &self.list[id as usize].spec
    }

    pub(super) fn len(&self) -> u32 {
        self.list.len() as u32
    }

    pub(super) fn likeness(&self, id: u32) -> u64 {
        self.list[id as usize].likeness
    }

    pub(super) fn deliveries(&self, id: u32) -> &[Delivery] {
        &self.list[id as usize].deliveries
    }

    pub(super) fn find(&mut self, spec: &Arc<Spec>) -> Option<SpecId> {
        let at = slot(spec);
        if let Some((known, id)) = &self.cache[at]
            && Arc::ptr_eq(known, spec)
        {
            return Some(*id);
        }
        let id = *self.by_value.get(spec)?;
        self.cache[at] = Some((Arc::clone(spec), id));
        Some(id)
    }
}

impl Names {
    pub(super) fn get(&self, id: NameId) -> Option<&Arc<str>> {
        self.by_id.get(&id)
    }

    pub(super) fn find(&self, name: &str) -> Option<NameId> {
        self.by_name.get(name).copied()
    }

    pub(super) fn absorb(&mut self, id: NameId, name: &Arc<str>) {
        self.by_id.insert(id, Arc::clone(name));
        self.by_name.insert(Arc::clone(name), id);
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = (NameId, &Arc<str>)> {
        self.by_id.iter().map(|(id, name)| (*id, name))
    }

    fn next(&self) -> NameId {
        self.by_id
            .last_key_value()
            .map_or(NameId(0), |(id, _)| NameId(id.0.saturating_add(1)))
    }
}

/// Hash of what makes a call the same call: everything but the code's fingerprint, which a deployment may change.
pub(super) fn likeness(spec: &Spec) -> u64 {
    let mut hash = Xxh3::new();
    let mut text = |text: Option<&str>| {
        hash.update(
            &text
                .map_or(u64::MAX, |text| text.len() as u64)
                .to_le_bytes(),
        );
        hash.update(text.unwrap_or("").as_bytes());
    };
    text(Some(&spec.action));
    text(Some(&spec.queue));
    text(spec.taint.as_deref());
    hash.update(&spec.priority.to_le_bytes());
    let retry = spec.retry;
    for number in [
        retry.max_attempts,
        retry.max_losses,
        retry.factor_milli,
        retry.jitter_milli,
    ] {
        hash.update(&number.to_le_bytes());
    }
    hash.update(&retry.delay_ms.to_le_bytes());
    hash.update(&retry.max_delay_ms.to_le_bytes());
    hash.update(&spec.timeout_ms.map_or([255; 8], u64::to_le_bytes));
    hash.update(&[u8::from(spec.pin_code), u8::from(spec.by_name)]);
    if let Some(batch) = spec.batch {
        hash.update(&batch.max_size.to_le_bytes());
        hash.update(&batch.max_wait_ms.to_le_bytes());
    }
    hash.digest()
}

/// Refuses a spec that no node could run by.
pub(super) fn check_spec(spec: &Spec) -> Result<(), Rejection> {
    let no = |what: &str| {
        Err(Rejection::new(
            Code::InvalidRequest,
            format!("action {:?}: {what}", spec.action),
        ))
    };
    if spec.action.is_empty() {
        return no("its name is empty: give it one");
    }
    if spec.by_name {
        return Ok(());
    }
    if spec.retry.max_attempts == 0 || spec.retry.max_losses == 0 {
        return no("max_attempts and max_losses must be at least 1");
    }
    if spec.batch.is_some_and(|batch| batch.max_size == 0) {
        return no("max_size of its batch must be at least 1");
    }
    Ok(())
}

impl World {
    /// Number of a spec; gives it one if it has none. The spec was checked.
    pub(super) fn intern(&mut self, tx: &mut Tx, spec: &Arc<Spec>) -> SpecId {
        if let Some(id) = self.specs.find(spec) {
            return id;
        }
        let id = SpecId(self.specs.len());
        self.put(
            tx,
            Fact::Spec {
                id,
                spec: Arc::clone(spec),
            },
        );
        id
    }

    /// Number of a route's or output's name; gives it one if it has none.
    pub(super) fn intern_name(&mut self, tx: &mut Tx, name: &Arc<str>) -> NameId {
        if let Some(id) = self.names.find(name) {
            return id;
        }
        let id = self.names.next();
        self.put(
            tx,
            Fact::Name {
                id,
                name: Arc::clone(name),
            },
        );
        id
    }

    /// A spec got its number: it gets its lane, and sessions are asked whether they serve it. Repetitions change nothing; a gap
    /// is damage.
    pub(super) fn absorb_spec(&mut self, id: SpecId, spec: &Arc<Spec>) -> bool {
        if id.0 < self.specs.len() {
            return self.specs.of(id.0) == spec;
        }
        if id.0 > self.specs.len() {
            return false;
        }
        let mut deliveries: Vec<Delivery> = Vec::new();
        for rule in &self.settings.outputs {
            if !rule.matches(&spec.action) {
                continue;
            }
            // I12: one outcome owes an output one delivery, however many rules match.
            if let Some(known) = deliveries.iter_mut().find(|d| d.output == rule.name) {
                known.succeeded |= rule.succeeded;
                known.failed |= rule.failed;
            } else {
                deliveries.push(Delivery {
                    output: Arc::clone(&rule.name),
                    succeeded: rule.succeeded,
                    failed: rule.failed,
                });
            }
        }
        self.specs.list.push(Entry {
            spec: Arc::clone(spec),
            likeness: likeness(spec),
            deliveries,
        });
        self.specs.by_value.insert(Arc::clone(spec), id);
        self.lanes.add();
        self.refresh_lane(id.0);
        true
    }

    /// What nodes of that spec run by: itself, or what was announced last for its action. `None`: nothing was.
    pub(super) fn resolve(&self, id: u32) -> Option<SpecId> {
        let spec = self.specs.of(id);
        if spec.by_name {
            self.announced.get(&spec.action).copied()
        } else {
            Some(SpecId(id))
        }
    }

    /// The spec that nodes of that spec run by.
    pub(super) fn resolved(&self, id: u32) -> Option<&Arc<Spec>> {
        self.resolve(id).map(|id| self.specs.of(id.0))
    }
}

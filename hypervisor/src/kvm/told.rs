//! What a guest is told of its CPU, and what another host has to have to tell it the same.
//!
//! The guest has seen what the first of its primaries told it, and goes on by that wherever it comes. Hosts of one CPU model differ in it by what their
//! kernels, microcode and firmware let KVM offer. So a backup **tells what its primary tells** wherever it could offer as much: KVM then lets the guest
//! have that and no more, as on the primary. Where it could not, the first leaf that it lacks something of is named.
#![forbid(unsafe_code)]

use std::fmt;

use kvm_bindings::{KVM_CPUID_FLAG_SIGNIFCANT_INDEX, KVM_MAX_CPUID_ENTRIES, kvm_cpuid_entry2};
use serde::{Deserialize, Serialize};

/// What a guest is told of its CPU: of each leaf its number, that of its subleaf, and EAX, EBX, ECX, EDX.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Told(Vec<[u32; 6]>);

/// Where two hosts of one model tell a guest different things.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Difference {
    /// The leaf and its subleaf.
    pub leaf: (u32, u32),
    /// EAX, EBX, ECX, EDX on the one side, if it has the leaf.
    pub theirs: Option<[u32; 4]>,
    /// On the other.
    pub ours: Option<[u32; 4]>,
}

impl Told {
    pub(super) fn of(entries: &[kvm_cpuid_entry2]) -> Self {
        let words = entries
            .iter()
            .map(|e| [e.function, e.index, e.eax, e.ebx, e.ecx, e.edx]);
        Self(words.collect())
    }

    fn get(&self, leaf: (u32, u32)) -> Option<[u32; 4]> {
        let mut found = self.0.iter().filter(|e| (e[0], e[1]) == leaf);
        found.next().map(|&[_, _, a, b, c, d]| [a, b, c, d])
    }

    /// The first leaf that is not the same, whether it can be [told](Self::in_place_of) or not. A leaf that is all zeroes is none. None: a guest cannot tell one from the other; or `theirs` is of a
    /// program that does not say.
    #[must_use]
    pub fn difference(&self, theirs: &Self) -> Option<Difference> {
        if theirs.0.is_empty() {
            return None;
        }
        let leaves = self.0.iter().chain(&theirs.0).map(|e| (e[0], e[1]));
        leaves
            .map(|leaf| Difference {
                leaf,
                theirs: theirs.get(leaf),
                ours: self.get(leaf),
            })
            .find(|found| found.theirs.unwrap_or_default() != found.ours.unwrap_or_default())
    }
}

/// What a word of a leaf is, and so when a host can tell another one's in place of its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Word {
    /// Bits that each offer something: a subset of one's own.
    Offers,
    /// A number up to which something goes: one that is no greater.
    UpTo,
    /// Anything else: the same.
    Is,
}

impl Word {
    /// The words of a leaf, by the processors' manuals and KVM's code.
    fn of(leaf: (u32, u32)) -> [Self; 4] {
        use Word::{Is, Offers, UpTo};
        match leaf {
            // The highest leaf.
            (0 | 0x8000_0000, _) => [UpTo, Is, Is, Is],
            (1, _) => [Is, Is, Offers, Offers],
            (6, _) => [Offers, Is, Is, Is],
            // The highest subleaf, then features.
            (7, 0) => [UpTo, Offers, Offers, Offers],
            (7, _) => [Offers; 4],
            // States that can be saved, and the room that they take.
            (0xd, 0) => [Offers, UpTo, UpTo, Offers],
            (0xd, 1) => [Offers, UpTo, Offers, Offers],
            // KVM's own features.
            (0x4000_0001, _) => [Offers, Is, Is, Is],
            (0x8000_0001, _) => [Is, Is, Offers, Offers],
            (0x8000_0007, _) => [Is, Offers, Is, Offers],
            (0x8000_0008, _) => [Is, Offers, Is, Is],
            (0x8000_0021, _) => [Offers, Is, Offers, Is],
            _ => [Is; 4],
        }
    }

    fn covers(self, theirs: u32, ours: u32) -> bool {
        match self {
            Self::Offers => theirs & !ours == 0,
            Self::UpTo => theirs <= ours,
            Self::Is => theirs == ours,
        }
    }
}

impl Told {
    /// The first leaf of `theirs` that a host which would tell this cannot tell: it lacks something that the guest was told of. A leaf that says nothing
    /// is one that any host can tell.
    #[must_use]
    pub fn lacks(&self, theirs: &Self) -> Option<Difference> {
        let found = |leaf| Difference {
            leaf,
            theirs: theirs.get(leaf),
            ours: self.get(leaf),
        };
        let cannot = |found: &Difference| {
            let [said, ours] = [found.theirs, found.ours].map(Option::unwrap_or_default);
            let mut words = Word::of(found.leaf)
                .into_iter()
                .zip(said.into_iter().zip(ours));
            said != [0; 4] && !words.all(|(word, (theirs, ours))| word.covers(theirs, ours))
        };
        let leaves = theirs.0.iter().map(|e| (e[0], e[1]));
        leaves.map(found).find(cannot)
    }

    /// These words as KVM takes them, if a host that would tell `own` can tell them as well: what another host tells its guest, which may come here. `None`
    /// where it cannot.
    pub(super) fn in_place_of(&self, own: &[kvm_cpuid_entry2]) -> Option<Vec<kvm_cpuid_entry2>> {
        let mut leaves: Vec<_> = self.0.iter().map(|e| (e[0], e[1])).collect();
        leaves.sort_unstable();
        let twice = leaves.windows(2).any(|two| two[0] == two[1]);
        let many = self.0.len() > KVM_MAX_CPUID_ENTRIES;
        if self.0.is_empty() || many || twice || Self::of(own).lacks(self).is_some() {
            return None;
        }
        // Whether the number of a subleaf counts is the leaf's, which this host knows if it has anything of it.
        let flags = |leaf: (u32, u32)| match own.iter().find(|entry| entry.function == leaf.0) {
            Some(entry) => entry.flags,
            None => KVM_CPUID_FLAG_SIGNIFCANT_INDEX,
        };
        let entry = |&[function, index, eax, ebx, ecx, edx]: &[u32; 6]| kvm_cpuid_entry2 {
            function,
            index,
            flags: flags((function, index)),
            eax,
            ebx,
            ecx,
            edx,
            ..Default::default()
        };
        Some(self.0.iter().map(entry).collect())
    }
}

impl fmt::Display for Difference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (leaf, subleaf) = self.leaf;
        let [theirs, ours] = [self.theirs, self.ours].map(Option::unwrap_or_default);
        write!(
            f,
            "leaf {leaf:#x}.{subleaf}: theirs {theirs:x?}, ours {ours:x?} (EAX, EBX, ECX, EDX)"
        )
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    /// A leaf of which every bit is set.
    pub(in crate::kvm) fn entry(function: u32, index: u32) -> kvm_cpuid_entry2 {
        kvm_cpuid_entry2 {
            function,
            index,
            eax: u32::MAX,
            ebx: u32::MAX,
            ecx: u32::MAX,
            edx: u32::MAX,
            ..Default::default()
        }
    }

    #[test]
    fn the_first_leaf_that_differs_is_named() {
        let all = [entry(0, 0), entry(1, 0), entry(7, 0)];
        let told = Told::of(&all);
        assert_eq!(told.difference(&told.clone()), None);
        assert_eq!(told.difference(&Told::default()), None, "it does not say");
        let mut other = all;
        other[2].edx = 0x80;
        let difference = told.difference(&Told::of(&other)).unwrap();
        let said = difference.to_string();
        assert!(said.starts_with("leaf 0x7.0: theirs ["), "{said}");
        assert!(said.contains("80]"), "{said}");
        // One side has a leaf, and the other none.
        let fewer = Told::of(&all[..2]);
        assert_eq!(told.difference(&fewer).unwrap().leaf, (7, 0));
        assert_eq!(fewer.difference(&told).unwrap().leaf, (7, 0));
        // A leaf of zeroes is none.
        let mut empty = all.to_vec();
        empty.push(kvm_cpuid_entry2 {
            function: 0x16,
            ..Default::default()
        });
        assert_eq!(told.difference(&Told::of(&empty)), None);
    }

    fn plain(leaf: (u32, u32), words: [u32; 4]) -> kvm_cpuid_entry2 {
        let [eax, ebx, ecx, edx] = words;
        kvm_cpuid_entry2 {
            eax,
            ebx,
            ecx,
            edx,
            ..entry(leaf.0, leaf.1)
        }
    }

    /// The kernels of two hosts of one model: the newer one's KVM knows more of the CPU.
    fn kernels() -> [Vec<kvm_cpuid_entry2>; 2] {
        let older = vec![
            plain((0, 0), [0x1f, 1, 2, 3]),
            plain((1, 0), [0xabc, 4, 0b0011, 0b0111]),
            plain((4, 0), [5, 6, 7, 8]),
            plain((7, 0), [1, 0b01, 0b10, 0b11]),
            plain((0x8000_0008, 0), [0x3030, 0b1, 0, 0]),
        ];
        let newer = vec![
            plain((0, 0), [0x24, 1, 2, 3]),
            plain((1, 0), [0xabc, 4, 0b1011, 0b0111]),
            plain((4, 0), [5, 6, 7, 8]),
            plain((7, 0), [2, 0b11, 0b10, 0b11]),
            plain((7, 2), [0, 0, 0, 0b100]),
            plain((0x8000_0008, 0), [0x3030, 0b11, 0, 0]),
            plain((0x8000_0021, 0), [0b1, 0, 0, 0]),
        ];
        [older, newer]
    }

    #[test]
    fn a_backup_with_a_newer_kernel_tells_what_its_primary_tells() {
        let [older, newer] = kernels();
        let [told, wider] = [&older, &newer].map(|entries| Told::of(entries));
        assert!(wider.difference(&told).is_some());
        assert_eq!(wider.lacks(&told), None);
        let entries = told.in_place_of(&newer).unwrap();
        assert_eq!(Told::of(&entries), told);
        // A backup of that one's: the old host again.
        assert!(told.in_place_of(&older).is_some());
        assert_eq!(Told::default().in_place_of(&newer), None, "it does not say");
    }

    #[test]
    fn what_a_backup_lacks_is_named_by_its_leaf() {
        let [older, newer] = kernels();
        let told = Told::of(&newer);
        assert_eq!(told.in_place_of(&older), None);
        // Every leaf by which the newer one is more, one after the other.
        let mut host = older;
        for leaf in [
            (0, 0),
            (1, 0),
            (7, 0),
            (7, 2),
            (0x8000_0008, 0),
            (0x8000_0021, 0),
        ] {
            let lacks = Told::of(&host).lacks(&told).unwrap();
            assert_eq!(lacks.leaf, leaf, "{lacks}");
            let theirs = newer
                .iter()
                .find(|e| (e.function, e.index) == leaf)
                .unwrap();
            host.retain(|e| (e.function, e.index) != leaf);
            host.push(*theirs);
        }
        assert!(told.in_place_of(&host).is_some());
        // What is no offer has to be the same: the width of addresses, the caches.
        for (leaf, word) in [((0x8000_0008, 0), 0), ((4, 0), 2), ((1, 0), 1)] {
            let mut other = newer.clone();
            let entry = other
                .iter_mut()
                .find(|e| (e.function, e.index) == leaf)
                .unwrap();
            match word {
                0 => entry.eax += 1,
                1 => entry.ebx += 1,
                _ => entry.ecx += 1,
            }
            assert_eq!(Told::of(&other).lacks(&told).unwrap().leaf, leaf);
        }
    }

    /// Whoever says a leaf twice may have KVM take the one that was not compared.
    #[test]
    fn a_leaf_that_is_said_twice_is_not_told() {
        let [_, newer] = kernels();
        let mut twice = newer.clone();
        twice.push(plain((7, 0), [1, u32::MAX, 0, 0]));
        assert_eq!(Told::of(&twice).in_place_of(&newer), None);
    }

    #[test]
    fn a_leaf_that_says_nothing_is_any_hosts() {
        let [older, mut newer] = kernels();
        for (function, index) in [(7, 1), (0x24, 0)] {
            newer.push(plain((function, index), [0; 4]));
        }
        newer.retain(|e| !matches!((e.function, e.index), (7, 2) | (0x8000_0021, 0)));
        for entry in &mut newer {
            if let Some(same) = older
                .iter()
                .find(|e| (e.function, e.index) == (entry.function, entry.index))
            {
                *entry = *same;
            }
        }
        let entries = Told::of(&newer).in_place_of(&older).unwrap();
        assert_eq!(
            Told::of(&entries),
            Told::of(&newer),
            "the very same, and in its order"
        );
    }
}

use std::os::fd::AsFd;

use super::*;

#[test]
fn only_a_memfd_whose_size_is_sealed_is_accepted() {
    let sealed = memfd(c"sealed", 2 * PAGE).unwrap();
    check_memfd(sealed.as_fd(), 2 * PAGE).unwrap();
    check_memfd(sealed.as_fd(), PAGE).unwrap_err();
    // SAFETY: the calls take a terminated name, a valid descriptor and numbers.
    let (fd, resized) = unsafe {
        let fd = libc::memfd_create(
            c"open".as_ptr(),
            libc::MFD_CLOEXEC | libc::MFD_ALLOW_SEALING,
        );
        let resized = libc::ftruncate(sealed.as_raw_fd(), PAGE as libc::off_t);
        libc::ftruncate(fd, 2 * PAGE as libc::off_t);
        (fd, resized)
    };
    assert!(resized < 0, "a peer cannot take the pages away");
    // SAFETY: the descriptor is new and nobody else's.
    let open = unsafe { OwnedFd::from_raw_fd(fd) };
    check_memfd(open.as_fd(), 2 * PAGE).unwrap_err();
}

#[test]
fn mappings_show_one_memory_and_stay_out_of_core_dumps() {
    let fd = memfd(c"two views", 2 * PAGE).unwrap();
    let write = Region::map(fd.as_fd(), 0, 2 * PAGE, Access::ReadWrite).unwrap();
    let read = Region::map(fd.as_fd(), PAGE, PAGE, Access::ReadOnly).unwrap();
    let address = format!("{:x}-", read.owner.base().as_ptr() as usize);
    let [view, _] = read.read_views(0, [PAGE, 0]);
    let [_, mut second] = write.write_views(0, [PAGE, PAGE]);
    let mut copy = [1; 21];
    view.copy_out(8, &mut copy);
    assert_eq!(copy, [0; 21]);
    second
        .bytes_mut(8, 21)
        .copy_from_slice(b"twenty-one characters");
    view.copy_out(8, &mut copy);
    assert_eq!(&copy, b"twenty-one characters");

    let maps = std::fs::read_to_string("/proc/self/smaps").unwrap();
    let (_, ours) = maps.split_once(&address).unwrap();
    let flags = ours
        .lines()
        .find(|line| line.starts_with("VmFlags:"))
        .unwrap();
    assert!(flags.split_whitespace().any(|flag| flag == "dd"), "{flags}");
}

#[test]
#[should_panic(expected = "an access lies inside its view")]
fn no_view_reaches_beyond_its_end() {
    let [view, _] = Region::heap(2 * PAGE).read_views(0, [PAGE, PAGE]);
    view.copy_out(PAGE - 8, &mut [0; 9]);
}

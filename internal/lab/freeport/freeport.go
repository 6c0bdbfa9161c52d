// Package freeport finds TCP ports on localhost for programs that are told on which to
// listen: those of a lab, and those of tests.
//
// A port is found long before its program listens on it, and again whenever that
// starts anew. So that nobody takes it meanwhile, each process has a part of the
// machine's ports for itself among all that look here, and all of them lie below those
// that the kernel gives to outgoing connections.
package freeport

import (
	"errors"
	"fmt"
	"net"
	"sync"
	"sync/atomic"
)

// ports are those of this process.
type ports struct {
	first int
	taken atomic.Int64 // that were given out, again from the first on when all were
	mark  net.Listener // while it is open they are this process's: the kernel ends it with the process
}

const each = 1000 // ports of a process

var reserved = sync.OnceValues(func() (*ports, error) {
	const first, last = 12_000, 32_000
	for at := first; at < last; at += each {
		if mark, err := net.Listen("unix", fmt.Sprintf("@kme-lab-ports-%d", at)); err == nil {
			return &ports{first: at, mark: mark}, nil
		}
	}
	return nil, errors.New("finding free ports: too many processes look for them")
})

// Listen takes the next port of this process that nobody listens on.
func Listen() (net.Listener, error) {
	p, err := reserved()
	if err != nil {
		return nil, err
	}
	for range each {
		var ln net.Listener
		port := p.first + int((p.taken.Add(1)-1)%each)
		if ln, err = net.Listen("tcp", fmt.Sprintf("localhost:%d", port)); err == nil {
			return ln, nil
		}
	}
	return nil, fmt.Errorf("finding a free port: %w", err)
}

// Find is the next port of this process that nobody listens on.
func Find() (int, error) {
	ln, err := Listen()
	if err != nil {
		return 0, err
	}
	port := ln.Addr().(*net.TCPAddr).Port
	if err := ln.Close(); err != nil {
		return 0, fmt.Errorf("finding a free port: %w", err)
	}
	return port, nil
}

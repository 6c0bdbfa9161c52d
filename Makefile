# The commands of the README. `make run` and `make test` need git, make, gcc and
# Go 1.26, and install the rest (deploy/prerequisites.sh).

GO         ?= go
GOFLAGS    += -buildvcs=false -trimpath
export GOFLAGS
export CGO_ENABLED := 1# without gcc: stop at once, rather than build an hsm that cannot work
TAGS       := noyubikey# smallstep without the PC/SC library
BIN        := bin

# What the programs say they are, and the package: day and commit of the source. The same
# commit makes the same programs, wherever it lies.
ifndef VERSION
VERSION    := 0~$(shell TZ=UTC git log -1 --abbrev=12 --format=%cd.%h --date=format-local:%Y%m%d%H%M%S 2>/dev/null || echo unknown)$(shell git diff --quiet HEAD 2>/dev/null || echo +modified)
endif
LDFLAGS    := -X=github.com/qutemail/kme/internal/release.version=$(VERSION)
STATICCHECK := honnef.co/go/tools/cmd/staticcheck@v0.8.2
GOFUMPT    := mvdan.cc/gofumpt@v0.12.0
STEP       := github.com/smallstep/cli/cmd/step@v0.30.2
FUZZTIME   ?= 10s
BENCHTIME  ?= 3s

.PHONY: all debootstrap run build test test-ha test-console test-arm64 test-deb test-reproducible storm rotation bench lint deb sbom release fuzz tools promtool prerequisites clean

all: build

## run: a whole two-site lab on this machine, until Ctrl-C
run: prerequisites build
	@$(BIN)/kmelab up

build:
	@test -x $(BIN)/kmelab || echo "building (the first time takes a minute or two)"
	@$(GO) build -tags $(TAGS) -ldflags="$(LDFLAGS)" -o $(BIN)/ ./cmd/...

## test: everything, against real Postgres, SoftHSM and certificates
test: prerequisites build tools promtool
	$(GO) test -tags $(TAGS) -vet off -timeout 30m ./... # vet is make lint's
	$(GO) test -tags $(TAGS),failpoint ./internal/failpoint ./internal/saedoor

## test-ha: failovers of a site's database under load (deploy/patroni); some minutes
test-ha: prerequisites
	@deploy/patroni/prerequisites.sh
	$(GO) test -tags $(TAGS),ha -run TestFailover -timeout 20m -v ./internal/lab

## test-console: the operators' console in a headless Chromium (Debian packages chromium, nodejs, npm); a minute
test-console: prerequisites
	@command -v chromium >/dev/null && command -v npm >/dev/null || { echo "kme: please install chromium, nodejs and npm"; exit 1; }
	cd internal/lab/testdata/console && npm ci --ignore-scripts --no-audit --no-fund --silent
	$(GO) test -tags $(TAGS),console -run '^TestConsole$$' -timeout 20m -v ./internal/lab

## test-arm64: what has assembly for arm64, emulated (Debian package qemu-user-static); a few minutes
test-arm64:
	@command -v qemu-aarch64-static >/dev/null || { echo "kme: please install qemu-user-static"; exit 1; }
	CGO_ENABLED=0 GOARCH=arm64 $(GO) test -exec qemu-aarch64-static -tags $(TAGS) -timeout 30m ./internal/distill ./internal/bb84

## bench: the benchmarks, in Go's benchmark format
bench: prerequisites build
	$(GO) test -tags $(TAGS) -run '^$$' -bench . -benchtime $(BENCHTIME) -timeout 60m ./...

## lint: vet, staticcheck and gofumpt at their pinned versions
lint:
	$(GO) vet -tags $(TAGS) ./...
	$(GO) vet -tags $(TAGS),failpoint ./...
	$(GO) vet -tags $(TAGS),ha,console ./internal/lab
	CGO_ENABLED=0 $(GO) vet -tags $(TAGS) ./hsm ./cmd/kmectl
	$(GO) run $(STATICCHECK) -tags $(TAGS) ./...
	@unformatted=$$($(GO) run $(GOFUMPT) -l .); test -z "$$unformatted" || { echo "gofumpt would change:"; echo "$$unformatted"; exit 1; }

## storm: everything dies now and then for STORM_TIME, under load
STORM_TIME ?= 10m
storm: prerequisites build
	KME_STORM_TIME=$(STORM_TIME) KME_STORM_FILLER=$${KME_STORM_FILLER-16384} $(GO) test -tags $(TAGS) -run '^TestStorm$$' -timeout 2h -v ./internal/lab

## rotation: an epoch a second for ROTATION_TIME, under load
ROTATION_TIME ?= 1m
rotation: prerequisites build
	KME_ROTATION=$(ROTATION_TIME) $(GO) test -tags $(TAGS) -run '^TestRotationUnderLoad$$' -timeout 2h -v ./internal/lab

## deb: dist/kme_VERSION_ARCH.deb, with units, users, alert rules, runbooks and clients
deb: sbom
	@SOURCE_DATE_EPOCH=$$(git log -1 --format=%ct) deploy/deb/build.sh dist/bin $(VERSION) dist

## test-deb: that package on a fresh Debian, whose systemd is booted (as root; Debian package debootstrap); some minutes
test-deb: debootstrap deb tools
	@deploy/deb/test.sh dist/kme_$(VERSION)_$$(dpkg --print-architecture).deb $(BIN)/step

debootstrap:
	@command -v debootstrap >/dev/null || { echo "kme: please install debootstrap"; exit 1; }

## test-reproducible: another clone of this commit makes the same programs and the same package; some minutes
test-reproducible: build deb
	@deploy/deb/reproduce.sh $(VERSION) $(BIN) dist

## sbom: what each program is made of, in CycloneDX, in dist/
CYCLONEDX := github.com/CycloneDX/cyclonedx-gomod/cmd/cyclonedx-gomod@v1.10.0
sbom: release
	@for program in kmed kmectl kme-ca qlink; do \
		$(GO) run $(CYCLONEDX) bin -json -std -noserial -notimestamp -version "$(VERSION)" -output dist/$$program.cdx.json dist/bin/$$program || exit 1; \
		echo "dist/$$program.cdx.json"; \
	done

# The programs of a package: at random addresses.
release:
	@$(GO) build -tags $(TAGS) -buildmode=pie -ldflags="-bindnow $(LDFLAGS)" -o dist/bin/ ./cmd/kmed ./cmd/kmectl ./cmd/kme-ca ./cmd/qlink

## fuzz: every fuzz target for FUZZTIME
fuzz:
	@.ci/fuzz $(FUZZTIME)

## tools: the step CLI at its pinned version, in bin/
tools: $(BIN)/step

$(BIN)/step:
	@echo "building step (once, about a minute)"
	@GOBIN=$(CURDIR)/$(BIN) $(GO) install -tags $(TAGS) $(STEP)

# of the Debian package prometheus: what tests the alert rules
promtool:
	@deploy/alerts/promtool.sh

prerequisites:
	@deploy/prerequisites.sh

## clean: what was built; .lab (keys, certificates, databases) stays
clean:
	rm -rf $(BIN)

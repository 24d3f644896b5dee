#!/usr/bin/env bash
# The studies of the shipped recipes, five seeds each, as many at once as there are cores, one process and core each:
#   ./launch/studies.sh [digits] [digits-300] [digits-300-unlabelled] [fashion-mnist] [glyphs]      all without arguments
# digits-300: of the digits' training images 300 have a label; digits-300-unlabelled: students see the others, too, without,
# and take as many steps. Results lie in launch/studies/<study>/results, a few KB an arm and seed; what is there is not run
# again. SEEDS="0 1" runs some, ARMS=top,composed,random only those arms. The set of glyphs is rendered first, from the fonts
# that launch/render_glyphs.py names.
set -euo pipefail
status=0
cd "$(dirname "${BASH_SOURCE[0]}")/.."
./launch/setup.sh
few_labels() {  # the recipe of the digits with few labels; $1: whether students see images without one, $2: epochs
    sed -e '/^#/d' -e "s/^name: digits/name: $study/" -e "s/^  epochs: 30/  epochs: $2/" -e '/^  finite: 30/s/ *#.*//' \
        -e "s|^  name: digits|  name: npz\n  path: data/digits-300.npz\n  unlabelled: $1|" launch/recipes/digits.yaml
}
(($#)) || set -- digits digits-300 digits-300-unlabelled fashion-mnist glyphs
for study in "$@"; do
    place=launch/studies/$study
    mkdir -p "$place"
    # Beside the arms of every study: options of the paper's objective, and other ways to group the classes.
    arms=("paper-all=objective={kind: paper, routes: all}" "paper-batch=objective={kind: paper, denominator: batch}")
    only=${ARMS:-}
    case $study in
        digits) arms+=("confusion=pyramid.1.partition=confusion" "random=pyramid.1.partition=random") ;;
        digits-300*)
            only=${ARMS:-alone,top,top-long,composed}
            [[ -f data/digits-300.npz ]] || .venv/bin/python launch/hide_labels.py || { status=$?; continue; } ;;
        fashion-mnist) arms+=("confusion=pyramid.1={teachers: 2, partition: confusion, model: pkd_resnet_s}") ;;
        glyphs)
            [[ -f data/glyphs.npz ]] || .venv/bin/python launch/render_glyphs.py || { status=$?; continue; }
            arms+=("contiguous=pyramid.1.partition=contiguous" "random=pyramid.1.partition=random") ;;
    esac
    more=(${only:+--arms "$only"})
    for arm in "${arms[@]}"; do
        [[ -n $only && ,$only, != *,${arm%%=*},* ]] || more+=(--arm "$arm")
    done
    # The recipe as it was when its study began, for later results to be of the same one.
    if [[ ! -f $place/recipe.yaml ]]; then
        case $study in
            digits-300) few_labels false 165 ;;  # 165 epochs of 4 steps, of the other 30 of 22
            digits-300-unlabelled) few_labels true 30 ;;
            *) cat "launch/recipes/$study.yaml" ;;
        esac > "$place"/new.yaml
        mv "$place"/new.yaml "$place"/recipe.yaml
    fi
    run=(.venv/bin/pkd study "$place/recipe.yaml" --study-folder "$place" "${more[@]}")
    # Every process knows all seeds, so that none takes what there is for the whole study. The last one finishes what others
    # did not, and says what is still missing.
    run+=(--seeds "$(printf '%s,' ${SEEDS:-0 1 2 3 4})")
    printf '%s\n' ${SEEDS:-0 1 2 3 4} | OMP_NUM_THREADS=1 xargs -P "$(nproc)" -I% "${run[@]}" --only-seed % || true
    "${run[@]}" || status=$?
done
exit "$status"
